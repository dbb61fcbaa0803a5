"""What the help says of each command in short, and its examples, by the name of the command's function, or of the group."""

from __future__ import annotations

SHORT: dict[str, str] = {
    "generate": "Answer a prompt, dense and pruned.",
    "chat": "Talk to a model in the terminal.",
    "ask": "Ask about pictures, dense and pruned.",
    "tune": "Find the settings for your text.",
    "evaluate": "Measure what it costs in quality.",
    "web_app": "Serve a web page on this machine.",
    "serve": "Serve an OpenAI endpoint, pruned.",
    "inspect": "Show what would be left out.",
    "bench": "Measure speed and memory.",
    "adapters": "List the supported model types.",
    "models_list": "List the sample models.",
    "models_fetch": "Fetch a sample model.",
    "models_upcycle": "Make a mixture of experts.",
}
EXAMPLES: dict[str, list[str]] = {
    "generate": [
        'pop-mm generate --model smollm2-135m --prompt "Why is the sky blue?"',
        "cat question.txt | pop-mm generate --model smollm2-135m --prompt - -q",
    ],
    "chat": ["pop-mm chat --model smollm2-135m --budget 0.65"],
    "ask": ['pop-mm ask "What is in the picture?" --image photo.png'],
    "tune": [
        "pop-mm tune --model smollm2-135m --max-kl 0.05 --save settings.json",
        "pop-mm generate --model smollm2-135m --prompt Hello --settings settings.json",
    ],
    "evaluate": [
        "pop-mm eval --model smollm2-135m --method thresholds --limit 2",
        "pop-mm eval --text my.txt --ratio 0.2 --output results",
    ],
    "web_app": ["pop-mm app --model tiny-vlm"],
    "serve": ["pop-mm serve --model smollm2-135m --budget 0.65"],
    "inspect": [
        "pop-mm inspect --model smollm2-135m --budget 0.65",
        "pop-mm inspect --model smollm2-135m --ratio 0.2 --check",
    ],
    "bench": [
        "pop-mm bench --model smollm2-135m --ratio 0.2 --rounds 3",
        "pop-mm bench --config llama3.2-1b --random-weights --layers 4",
    ],
    "adapters": ["pop-mm adapters --markdown"],
    "models_list": ["pop-mm models list"],
    "models_fetch": ["pop-mm models fetch smollm2-135m"],
    "models": ["pop-mm models list", "pop-mm models fetch smollm2-135m"],
    "pop-mm": [
        'pop-mm generate --model smollm2-135m --prompt "Why is the sky blue?"',
        "pop-mm chat --model smollm2-135m",
        "pop-mm COMMAND -h",
    ],
    "models_upcycle": [
        "pop-mm models upcycle --source smollm2-135m --to mixtral --output mixtral",
    ],
}
