"""The demo VLM: its data is right and split, its fast paths equal the real ones, and the shipped checkpoint answers."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

FOLDER = Path(__file__).parents[2] / "demos" / "tiny_vlm"
sys.path.insert(0, str(FOLDER))
from batches import Batches, patchify  # noqa: E402
from evaluate import Item, Score, answer, evaluation_set, same, score  # noqa: E402
from evaluate import load as load_folder  # noqa: E402
from inputs import encode, user  # noqa: E402
from model import FAMILIES, IMAGE_TOKENS, build_image_processor, build_model  # noqa: E402
from perception import CELLS, Head, contents  # noqa: E402
from questions import DESCRIPTION, TYPES, Question, ask, templates  # noqa: E402
from scenes import COLOURS, POSITIONS, SHAPES, Scene, Shape, render, sample_scene  # noqa: E402
from tokenizer import SPECIAL, build_tokenizer  # noqa: E402
from train import answer_loss, learning_rate, save  # noqa: E402

sys.path.remove(str(FOLDER))

SHIPPED = FOLDER.parents[1] / "pop_mm" / "data" / "tiny_vlm"
NUMBERS = ["no", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return load_folder(SHIPPED)


def scenes(count, split="train", seed=3):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(count)]


def matching(scene, words):
    """Shapes that a noun phrase such as "red circle", "stars", "green thing" or "shape at the top left" means."""
    colour = next((name for name in COLOURS if re.search(rf"\b{name}\b", words)), None)
    kind = next((name for name in SHAPES if re.search(rf"\b{name}(e?s)?\b", words)), None)
    place = re.search(r" at the (.*)", words)
    return [
        shape
        for shape in scene.shapes
        if (colour is None or shape.colour == colour)
        and (kind is None or shape.kind == kind)
        and (place is None or POSITIONS[shape.cell] == place[1])
    ]


def works_out(scene, question):
    """Work the answer out anew, from the wording of the question and the list of shapes."""
    text, given = question.text.rstrip("?."), question.answer.rstrip(".")
    if question.text in DESCRIPTION:
        head, listed = given.split(": ")
        count = len(scene.shapes)
        assert head == ("There is one shape" if count == 1 else f"There are {NUMBERS[count]} shapes")
        parts = re.split(r", | and ", listed)
        assert len(parts) == count
        for part, shape in zip(parts, sorted(scene.shapes, key=lambda shape: shape.cell), strict=True):
            article = "an" if shape.colour == "orange" else "a"
            assert part == f"{article} {shape.colour} {shape.kind} at the {POSITIONS[shape.cell]}"
        return
    if counted := re.match(r"(?:How many|Count the) ((?:\w+ )?\w+s)\b", text):
        number = len(matching(scene, counted[1]))
        found = re.fullmatch(r"There (is|are) (\w+) (.*)", given)
        assert found[2] == NUMBERS[number]
        assert (found[1] == "is") == (number == 1)
        singular = re.sub(r"(?<=ss)es$|s$", "", counted[1])
        assert found[3] == (singular if number == 1 else counted[1])
        return
    if present := re.search(r"\b(?:an?) (\w+ \w+)", text):
        article = "an" if present[1].startswith("orange") else "a"
        what = f"{article} {present[1]}" if matching(scene, present[1]) else f"no {present[1]}"
        assert given == f"There is {what} in the picture"
        return
    (subject, told) = re.fullmatch(r"The (.*?) is (.*)", given).groups()
    assert set(subject.split()) <= set(text.split())
    (shape,) = matching(scene, subject)
    if re.search("colour", text):
        assert told == shape.colour
    elif re.search("shape (is|does)|the shape", text) and question.kind == "shape":
        assert told == f"a {shape.kind}"
    else:
        assert told == f"at the {POSITIONS[shape.cell]}"


def test_same_seed_same_scenes():
    first, second = scenes(20), scenes(20)
    assert first == second
    assert all(np.array_equal(render(one), render(other)) for one, other in zip(first, second, strict=True))
    assert scenes(20, seed=4) != first


def test_shapes_are_drawn_in_their_cells_in_their_colours():
    for kind in SHAPES:
        for colour, rgb in COLOURS.items():
            for cell in range(9):
                picture = np.asarray(render(Scene((Shape(kind, colour, cell),), cell))).astype(int)
                near = (np.abs(picture - rgb) <= 14).all(-1)
                rows, columns = near.nonzero()
                assert len(rows) > 40
                assert int(np.median(rows) // (64 / 3)) * 3 + int(np.median(columns) // (64 / 3)) == cell


def test_every_question_has_its_one_right_answer():
    rng, asked = np.random.default_rng(5), dict.fromkeys(TYPES, 0)
    for scene in [*scenes(400), *scenes(100, "eval")]:
        for kind in TYPES:
            if (question := ask(scene, kind, rng)) is not None:
                assert question.kind == kind
                works_out(scene, question)
                asked[kind] += 1
    assert min(asked.values()) > 300


def test_the_telling_word_is_never_the_first(tokenizer):
    rng, first = np.random.default_rng(6), set()
    for scene in scenes(300):
        for kind in TYPES:
            if (question := ask(scene, kind, rng)) is not None:
                first.add(tokenizer.tokenize(question.answer)[0])
    assert first == {"The", "There"}


def test_evaluation_scenes_are_never_trained_on():
    known = {item.scene.shapes for item in evaluation_set(40)}
    trained = scenes(4000)
    assert not known & {scene.shapes for scene in trained}
    assert max(scene.style for scene in trained) < min(item.scene.style for item in evaluation_set(40))
    assert evaluation_set(5) == evaluation_set(5)
    assert evaluation_set(5) != evaluation_set(5, seed=1)


def test_tokenizer_knows_every_word(tokenizer):
    words = set()
    for text in set(templates()):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        words |= set(tokenizer.convert_ids_to_tokens(ids))
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text))  # a word, a token
    assert tokenizer.decode(tokenizer("Zoë saw 12 llamas").input_ids) == "Zoë saw 12 llamas"
    assert all(len(tokenizer(token).input_ids) == 1 for token in SPECIAL)


def test_chat_template_and_encoding(tokenizer):
    picture = render(scenes(1)[0])
    processor = build_image_processor()
    long = [
        user("Where is the red circle?", picture),
        {"role": "assistant", "content": "The red circle is at the top."},
    ]
    inputs = encode([[user("What do you see?", picture)], [*long, user("Count the stars.")]], tokenizer, processor)
    texts = tokenizer.batch_decode(inputs["input_ids"])
    image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    assert texts[1] == (
        f"<|im_start|>user\n{image}Where is the red circle?<|im_end|>\n<|im_start|>assistant\n"
        "The red circle is at the top.<|im_end|>\n<|im_start|>user\nCount the stars.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts[0].endswith(f"<|im_start|>user\n{image}What do you see?<|im_end|>\n<|im_start|>assistant\n")
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [IMAGE_TOKENS, IMAGE_TOKENS]
    assert inputs["attention_mask"][0, 0] == 0  # padded on the left
    assert "pixel_values" not in encode([[user("Count the stars.")]], tokenizer, processor)


def test_patchifier_equals_the_processor():
    pictures = [render(scene) for scene in scenes(3)]
    real = build_image_processor()(pictures, return_tensors="pt")
    torch.testing.assert_close(patchify(np.stack([np.asarray(picture) for picture in pictures])), real["pixel_values"])
    assert real["image_grid_thw"].tolist() == [[1, 8, 8]] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_turns_equal_single_questions(tokenizer, family):
    """A turn of a training row gives the logits that the same question gives when it is asked alone, or in a chat."""
    torch.manual_seed(0)
    model = build_model(tokenizer, family).double().eval()
    assert sum(value.numel() for value in model.parameters()) < 4_000_000
    batch = Batches(tokenizer, 6, 112, 7)(0)
    batch["pixel_values"] = batch["pixel_values"].double()
    tensors = {name: value for name, value in batch.items() if name not in ("labels", "kinds", "turns", "cells")}
    packed = model.model(**tensors, use_cache=False).last_hidden_state
    patches = 64
    for row in range(6):
        seen = batch["attention_mask"][row, 0]
        for turn in (1, 2):
            place = ((batch["turns"][row] == turn) & (batch["labels"][row] != -100)).nonzero()[-1, 0]
            kept = seen[place].nonzero()[:, 0]
            ids = batch["input_ids"][row, kept][None]
            alone = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).long(),
                pixel_values=batch["pixel_values"][row * patches : (row + 1) * patches],
                image_grid_thw=batch["image_grid_thw"][:1],
                use_cache=False,
            ).last_hidden_state[0, -1]
            torch.testing.assert_close(packed[row, place], alone)


def test_vision_task_names_the_shape_in_each_tokens_cell():
    assert CELLS.reshape(4, 4).tolist() == [[0, 1, 1, 2], [3, 4, 4, 5], [3, 4, 4, 5], [6, 7, 7, 8]]
    truth = contents(Scene((Shape("circle", "red", 0), Shape("cross", "black", 5)), 0)).reshape(4, 4, 2)
    assert truth[0, 0].tolist() == [1, 1]
    assert truth[1, 3].tolist() == truth[2, 3].tolist() == [5, 8]
    assert truth.any(-1).sum() == 3


def test_training_rows_learn_answers_only(tokenizer):
    batches = Batches(tokenizer, 8, 112, 1)
    batch = batches(3)
    again = Batches(tokenizer, 8, 112, 1)(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["input_ids"], batches(4)["input_ids"])
    halves = [Batches(tokenizer, 8, 112, 1, (part, 2))(3)["input_ids"] for part in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).view(8, 112), batch["input_ids"])
    for row in range(8):
        text = tokenizer.decode(batch["input_ids"][row])
        answers = re.findall(r"assistant\n(.*?<\|im_end\|>)", text)
        learnt = batch["labels"][row][batch["labels"][row] != -100]
        assert tokenizer.decode(learnt) == "".join(answers)
        assert len(answers) >= 2


def test_loss_falls_and_the_folder_loads(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = build_model(tokenizer).train()
    head = Head(model.config.text_config.hidden_size)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    batch = Batches(tokenizer, 4, 112, 0)(0, most=1)
    losses = []
    for _ in range(6):
        loss, right = answer_loss(model, batch, head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {kind for kind, _ in right} <= set(TYPES)
    assert learning_rate(0.2, 1.0) < learning_rate(0.23, 1.0) > learning_rate(0.5, 1.0) > learning_rate(1.0, 1.0)
    save(model.eval(), tokenizer, tmp_path)
    loaded, its_tokenizer, its_processor = load_folder(tmp_path)
    assert loaded.dtype == torch.float32
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16  # what the weights are stored in
    assert loaded.config.tie_word_embeddings
    texts = answer(evaluation_set(1), loaded, its_tokenizer, its_processor, batch=3)
    assert len(texts) == len(TYPES)


def test_scoring():
    assert same("The circle is red.", "the circle is red")
    assert same(" There are two shapes. ", "There are two shapes.")
    assert not same("The circle is blue.", "The circle is red.")
    assert not same("", "The circle is red.")
    scene = scenes(1)[0]
    answers = {"There are two stars.": "count", "The star is red.": "colour", "The star is blue.": "colour"}
    items = [Item(scene, Question(kind, "?", text)) for text, kind in answers.items()]
    scores = score(items, ["There are two stars.", "The star is red.", "The star is red."])
    assert scores == {"colour": Score(1, 2), "count": Score(1, 1)}
    low, high = Score(190, 200).interval  # from Wilson's formula, by hand
    assert (round(low, 4), round(high, 4)) == (0.9104, 0.9726)
    assert Score(200, 200).interval[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 questions but 1 answers"):
        score(items, ["x"])


def test_shipped_folder(shipped, tokenizer):
    model, its_tokenizer, processor = shipped
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert sum(value.numel() for value in model.parameters()) < 4_000_000
    assert (SHIPPED / "model.safetensors").stat().st_size < 8_000_000
    assert type(its_tokenizer).__name__ == "Qwen2Tokenizer"
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()  # what train.py would make now
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert processor.patch_size == 8
    assert "license: apache-2.0" in (SHIPPED / "README.md").read_text()


def test_shipped_checkpoint_answers(shipped):
    items = evaluation_set(10, seed=1)
    scores = score(items, answer(items, *shipped, batch=30))
    assert all(own.right >= 8 for own in scores.values()), scores


def test_shipped_checkpoint_answers_alone_as_in_a_batch(shipped):
    items = evaluation_set(2, seed=2)
    assert answer(items, *shipped, batch=1) == answer(items, *shipped, batch=12)
