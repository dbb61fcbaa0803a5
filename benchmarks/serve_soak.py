"""Does `pop-mm serve` keep its memory and its answers? 2,000 requests of every kind to one server process.

    python benchmarks/serve_soak.py [--requests 2000] [--model tiny-vlm] [--clients 4] [--quick] [--json FILE]

Needs the extra [serve]. `clients` threads ask at once: texts and pictures, whole and streamed, greedy and sampled, with the
server's settings and with other budgets and ratios; some leave half-way, some ask for what is refused. One greedy question is
asked again and again: its answer must stay what it was. The resident memory of the server is read as the requests go by.
The first half warms up (allocators, and code of every kind of request); after it memory must not grow.
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.table import Table

from measure import Verdict, print_verdicts, save_json, wide_console
from pop_mm.app.examples import SCENES

JUDGED_FROM = 1000  # requests
GROWTH = 0.01  # of the resident memory, between the middle and the end
MARKS = 10  # rows of the table
KINDS = {
    "text": 6,
    "picture": 4,
    "sampled": 3,
    "budget": 2,
    "ratio": 1,
    "dense": 1,
    "leaves": 2,
    "refused": 2,
    "same": 2,
}
ADDRESS = "/v1/chat/completions"


class Soak:
    """Requests to one server, and what became of them.

    Parameters
    ----------
    url : str
    process : psutil.Process
        The server's.
    pictures : bool
        Whether the model takes them.
    """

    def __init__(self, url: str, process: psutil.Process, pictures: bool) -> None:
        self._url, self._process = url, process
        self._kinds = {kind: share for kind, share in KINDS.items() if pictures or kind != "picture"}
        self._picture = base64.b64encode((SCENES / "two-blue.png").read_bytes()).decode()
        self._lock = threading.Lock()
        self._left = 0
        self.outcomes: Counter[str] = Counter()
        self.same: set[str] = set()
        self.memory: list[tuple[int, int]] = []

    def run(self, requests: int, clients: int) -> None:
        """Ask from several threads until so many requests are done."""
        self._left = requests
        threads = [threading.Thread(target=self._client, args=(number, requests)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, requests: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=self._url, trust_env=False, timeout=300) as client:
            while True:
                with self._lock:
                    if not self._left:
                        return
                    self._left -= 1
                    done = requests - self._left
                    if done % max(requests // MARKS, 1) == 0:
                        self.memory.append((done, self._process.memory_info().rss))
                (kind,) = chance.choices(list(self._kinds), list(self._kinds.values()))
                outcome = f"{kind} {self._ask(client, kind, chance)}"
                with self._lock:
                    self.outcomes[outcome] += 1

    def _ask(self, client: httpx.Client, kind: str, chance: random.Random) -> str:
        body = self._body(kind, chance)
        if not body.get("stream"):
            answer = client.post(ADDRESS, json=body)
            if kind == "same" and answer.status_code == 200:
                with self._lock:
                    self.same.add(answer.json()["choices"][0]["message"]["content"])
            return str(answer.status_code)
        with client.stream("POST", ADDRESS, json=body) as answer:
            for count, _ in enumerate(answer.iter_lines()):
                if kind == "leaves" and count > 6:
                    return "left"
            return str(answer.status_code)

    def _body(self, kind: str, chance: random.Random) -> dict[str, Any]:
        text = "What do you see?" if kind == "same" else "Where is it? " * chance.randint(1, 40)
        content: Any = text
        if kind == "picture":
            url = f"data:image/png;base64,{self._picture}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16}
        if kind == "same":
            return body
        body["stream"] = kind == "leaves" or chance.random() < 0.5
        body["max_tokens"] = 400 if kind == "leaves" else chance.randint(1, 32)
        more = {
            "sampled": {"temperature": 1.0},
            "budget": {"budget": chance.choice((0.5, 0.8))},
            "ratio": {"ratio": 0.2},
            "dense": {"budget": 1},
            "refused": chance.choice(({"budget": 7}, {"messages": []}, {"model": "another"}, {"n": 2})),
        }
        return {**body, **more.get(kind, {})}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", default="tiny-vlm")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="40 requests: only shows that it runs")
    parser.add_argument("--threads", type=int, help="of the server")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    requests = 40 if asked.quick else asked.requests
    command = [sys.executable, "-m", "pop_mm", "serve", "--model", asked.model, "--port", "0"]
    threads = {} if asked.threads is None else {"OMP_NUM_THREADS": str(asked.threads)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split(" answers at ")[1].split("/v1")[0]
        soak = Soak(url, psutil.Process(server.pid), pictures="vlm" in asked.model)
        started = time.perf_counter()
        soak.run(requests, asked.clients)
        seconds = time.perf_counter() - started
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(60)
    verdicts = judge(soak, metrics, code, judged=requests >= JUDGED_FROM)
    told = {verdict.target: verdict.passed for verdict in verdicts}
    result = {
        "model": asked.model,
        "memory": soak.memory,
        "outcomes": soak.outcomes,
        "seconds": seconds,
        "verdicts": told,
    }
    save_json(asked.json, result)
    return show(soak, f"{requests} requests from {asked.clients} clients in {seconds:.0f} s", verdicts)


def judge(soak: Soak, metrics: str, code: int, judged: bool) -> list[Verdict]:
    """What must hold."""
    wanted = {"leaves": {"left", "200"}, "refused": {"400", "404"}}
    strange = [o for o in soak.outcomes if o.split()[1] not in wanted.get(o.split()[0], {"200"})]
    idle = all(f"pop_mm_requests_{state} 0\n" in metrics for state in ("running", "waiting"))
    grown = soak.memory[-1][1] / soak.memory[(len(soak.memory) - 1) // 2][1] - 1
    return [
        Verdict(
            f"resident memory grows by {grown:.2%} in the second half (target {GROWTH:.0%})",
            grown <= GROWTH if judged else None,
        ),
        Verdict("every request has the outcome that it should", not strange),
        Verdict("the same question always has the same answer", len(soak.same) == 1),
        Verdict("nothing runs or waits at the end", idle),
        Verdict(f"Ctrl-C ends the server with code 130, not {code}" if code != 130 else "Ctrl-C ends it", code == 130),
    ]


def show(soak: Soak, said: str, verdicts: Sequence[Verdict]) -> int:
    """Print it; 1 if something failed."""
    console = wide_console()
    table = Table("requests", "resident memory", "since the first tenth")
    first = soak.memory[0][1]
    for done, size in soak.memory:
        table.add_row(str(done), f"{size / 2**20:.1f} MiB", f"{(size - first) / first:+.2%}")
    console.print(table)
    kinds = Table("request", "outcome", "count")
    for outcome, count in sorted(soak.outcomes.items()):
        kinds.add_row(*outcome.split(), str(count))
    console.print(kinds)
    console.print(f"{said}\n")
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
