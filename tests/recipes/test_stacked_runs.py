"""Runs that stand on other adapters: a fusion of tuned bottlenecks, and a tuned run that cannot be merged as a base."""

import json
import os
import shutil
import signal

import pytest
import torch

from minillm.data import example_batches, text_examples
from minillm.evaluation import evaluate
from minillm.files import read_json
from minillm.models import load_model
from minillm.peft import activate, load_adapter, save_adapter, tunings_of
from minillm.recipes import tune as tune_recipe
from minillm.recipes.locate import load
from minillm.training import ProgressBar, classification_loss

SMALL = {
    "prompt": ("prompt.length=3",),
    "ptuning": ("ptuning.length=3",),
    "prefix": ("prefix.length=3",),
    "mola": ("mola.experts=2", "mola.shape=rectangle"),
    "bitfit": ("bitfit.create_missing=true",),
    "pruned_bitfit": ("pruned_bitfit.create_missing=true", "pruned_bitfit.score_steps=2"),
}


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder with 40 labelled texts to learn from, and 20 to measure on."""
    folder = tmp_path_factory.mktemp("task")
    texts = [{"text": f"{['rain', 'roofs'][i % 2]} on {i} mats", "label": i % 2} for i in range(60)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, texts[:40])))
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, texts[40:])))
    return folder


@pytest.fixture
def tuned(cli, base, texts, task, tune_sizes, tmp_path):
    """`tuned(method, *words, base=, labels=)` -> (run folder, code, what was printed, what was said on stderr)"""
    count = iter(range(100))

    def call(method, *words, base=base, labels=False, run=None):
        run = run or tmp_path / f"{method}{next(count)}"
        data = (f"data.train={texts / 'notes.jsonl'}",)
        if labels:
            data = (
                f"data.train={task / 'train.jsonl'}",
                f"data.held_out={task / 'held_out.jsonl'}",
                "data.label=label",
            )
        sizes = [*tune_sizes, "data.length=36", *data, *SMALL.get(method, ())]
        return run, *cli("tune", f"base={base}", f"run={run}", f"method={method}", *sizes, *words)

    return call


@pytest.fixture
def made(tuned):
    """The same where it must succeed -> run folder"""

    def call(*args, **kwargs):
        run, code, _, err = tuned(*args, **kwargs)
        assert code == 0, err
        return run

    return call


@pytest.fixture
def pair(made):
    """adapters=... of two bottlenecks, of which one reads labels, and the two runs"""
    one, two = made("bottleneck", labels=True), made("bottleneck", "bottleneck.size=3", "seed=1")
    return f"adapters=one:{one},two:{two}", one, two


def measured(run, when):
    return read_json(run / "report.json")["held_out"]["new text"][when]["loss"]


def held_out_loss(run, task):
    """What `load` makes of a classifier's run, measured again."""
    model, tokenizer, _, labels = load(run, writes=False)
    lines = [json.loads(line) for line in (task / "held_out.jsonl").read_text().splitlines()]
    numbers = [labels.index(str(line["label"])) for line in lines]
    examples = text_examples(tokenizer, [line["text"] for line in lines], numbers, max_length=36)
    return evaluate(model, example_batches(examples, 4, tokenizer.pad_id or 0), classification_loss)["loss"]


class Stop(ProgressBar):
    """Sends this process a signal when step 3 is done; training ends there."""

    def on_step(self, trainer, record):
        super().on_step(trainer, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("labels", [False, True])
def test_a_fusion_needs_only_its_own_run_and_the_base(labels, pair, made, cli, task, base, tmp_path):
    words, *runs = pair
    fused = made("fusion", words, labels=labels)
    for run in runs:
        shutil.rmtree(run)
    assert [path.name for path in sorted((fused / "under").iterdir())] == ["one", "two", "under.json"]
    assert tunings_of(load(fused, writes=not labels).model)["default"].under == ("one", "two")
    if labels:
        assert held_out_loss(fused, task) == pytest.approx(measured(fused, "after"), rel=1e-6)
    say = ("classify", fused, "rain") if labels else ("generate", fused, "the cat", "max_new_tokens=5")
    code, said, err = cli(*say)
    assert code == 0 and said, err
    assert "two" in cli("info", fused)[1].partition("stands on")[2].splitlines()[0]

    moved = fused.rename(tmp_path / "moved")
    (moved / "adapter").rename(moved / "alone")
    assert cli(say[0], moved / "alone", *say[2:], f"base={base}")[1] == said
    shutil.rmtree(moved / "under" / "two")
    code, _, err = cli(say[0], moved / "alone", *say[2:], f"base={base}")
    assert code == 2 and f"stands on others, which are not there: {moved / 'under' / 'two'}" in err


def test_a_fusion_is_what_python_makes_of_its_folders(pair, made, base):
    fused = made("fusion", pair[0])
    model = load_model(base / "model")
    for name in ("one", "two"):
        if tunings_of(model):
            activate(model)
        load_adapter(model, fused / "under" / name, name)  # its base is compared
    activate(model, "one", "two")
    load_adapter(model, fused / "adapter")
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), load(fused).model(tokens))
    trained = load(pair[2]).model
    for name, value in tunings_of(trained)["default"].parameters().items():
        assert torch.equal(tunings_of(model)["two"].parameters()[name], value), name


def test_before_a_fusion_there_is_the_base_alone(pair, made):
    fused = made("fusion", pair[0])
    assert measured(fused, "before") == measured(pair[2], "before")
    assert measured(fused, "after") != measured(fused, "before")


@pytest.mark.parametrize("method", ["fusion", "lora", "pruned_bitfit"])
def test_a_stopped_run_goes_on_exactly(method, pair, made, tuned, cli, monkeypatch):
    first = made("prompt", labels=True)
    words = {"words": (pair[0],)} if method == "fusion" else {"words": (), "base": first}
    more, words = words.pop("words"), {"labels": True, **words}
    whole = made(method, *more, "train.steps=6", **words)
    with monkeypatch.context() as patch:
        patch.setattr(tune_recipe, "ProgressBar", Stop)
        run, code, _, err = tuned(method, *more, "train.steps=6", **words)
    assert code == 130, err
    for other in pair[1:]:  # what it stands on is its own by now
        shutil.rmtree(other)
    code, out, err = cli("tune", f"run={run}", "--resume")
    assert code == 0 and "goes on after step 3" in out, err
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    reports = [read_json(each / "report.json") | {"seconds": 0} for each in (whole, run)]
    assert reports[0] == reports[1]


def test_all_that_is_wrong_with_the_adapters_is_said_at_once(pair, made, tuned, sizes, texts, base, cli, tmp_path):
    _, one, two = pair
    lora, other = made("lora"), tmp_path / "other"
    assert cli("pretrain", f"data.train={texts / 'text'}", f"run={other}", "seed=5", *sizes)[0] == 0
    foreign, stacked = made("bottleneck", base=other), made("bottleneck", base=one, labels=True)
    words = f"a:{one},b:{lora},c:{tmp_path / 'nowhere'},d:{base},e:{foreign},f:{stacked}"
    run, code, _, err = tuned("fusion", f"adapters={words}", labels=True)
    assert code == 2 and not run.exists()
    assert f"b: {lora} is lora, and bottleneck adapters are fused" in err
    assert f"c: {tmp_path / 'nowhere'} does not exist" in err
    assert f"d: {base} is a whole model; name a run of minillm tune method=bottleneck" in err
    assert f"e: {foreign} was trained on a base with other weights" in err
    assert f"f: {stacked} stands on other adapters (bottleneck), and those fused do not" in err
    assert "  a: " not in err
    _, code, _, err = tuned("fusion", f"adapters=a:{two},b:{made('bottleneck', 'bottleneck.kind=pfeiffer')}")
    assert code == 2 and "they stand at different places: give all the same kind" in err


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("fusion", (), "adapters: which? Name at least two tuned bottlenecks, such as adapters=a:runs/one,b:runs/two"),
        ("fusion", ("adapters=a:x",), "adapters: which? Name at least two"),
        ("fusion", ("adapters=a:x,a:y",), "adapters: 'a' is named twice"),
        ("fusion", ("adapters=a.b:x,c:y",), "adapters: 'a.b' cannot name an adapter"),
        ("fusion", ("adapters=default:x,c:y",), "'default' will be the fusion itself: choose another name"),
        ("fusion", ("adapters=a:x,c:y", "fusion.adapters=a,b,c"), "fusion.adapters: leave it out"),
        ("fusion", ("adapters=x,y",), "adapters[0]: expected 2 values, each text, got ['x']"),
        ("lora", ("adapters=a:x,b:y",), "adapters: method=lora fuses none: leave it out, or choose method=fusion"),
    ],
)
def test_adapters_that_cannot_be_meant(method, words, expected, tuned):
    run, code, _, err = tuned(method, *words)
    assert code == 2 and expected in err and not run.exists(), err


@pytest.mark.parametrize("first", ["prompt", "ptuning", "prefix", "mola", "bottleneck", "bitfit", "pruned_bitfit"])
def test_what_cannot_be_merged_stays_under_the_next(first, made, tuned, cli):
    """Each run begins with the loss at which the one before it ended."""
    one = made(first)
    two, code, out, err = tuned("lora", "lora.rank=2", base=one)
    assert code == 0 and f"stays as it is, under the new adapter, in {two / 'under'}" in out, err
    assert measured(two, "before") == pytest.approx(measured(one, "after"), rel=1e-6)
    assert measured(two, "after") != measured(two, "before")
    three = made("ia3", base=two)
    assert measured(three, "before") == pytest.approx(measured(two, "after"), rel=1e-6)
    shutil.rmtree(one), shutil.rmtree(two)
    code, _, err = cli("generate", three, "the cat", "max_new_tokens=5")
    assert code == 0, err
    if "bitfit" not in first:  # the biases could be merged, and not saved
        code, _, err = cli("generate", three, "the cat", "merge=true")
        assert code == 2 and "cannot be merged" in err
    assert "stands on" in cli("info", three)[1] and tunings_of(load(three).model)["default"].under == (
        "base_1",
        "base_2",
    )


def test_a_fusion_stays_under_the_next(pair, made):
    one = made("fusion", pair[0])
    two = made("prefix", base=one)
    assert measured(two, "before") == pytest.approx(measured(one, "after"), rel=1e-6)
    three = made("lora", base=two)
    assert measured(three, "before") == pytest.approx(measured(two, "after"), rel=1e-6)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("first", ["prefix", "bottleneck", "bitfit"])
def test_a_classifier_on_any_tuned_run(first, labels, made, tuned, task, cli):
    """Of a classifier the head goes and the adapter stays; a run that writes text becomes a classifier."""
    one = made(first, labels=labels)
    two = made("lora", base=one, labels=True)
    assert held_out_loss(two, task) == pytest.approx(measured(two, "after"), rel=1e-6)
    (below,) = tunings_of(load(two, writes=False).model)["default"].under
    kept, before = (
        tunings_of(load(run, writes=False).model)[n].parameters() for run, n in ((two, below), (one, "default"))
    )
    before = {name.removeprefix("body."): value for name, value in before.items()}
    kept = {name: value for name, value in kept.items() if name != "classifier.bias"}  # BitFit means all of them
    assert kept
    for name, value in kept.items():
        assert not name.startswith("classifier")
        assert torch.equal(value, before[name.removeprefix("body.")]), name
    assert cli("classify", two, "rain")[0] == 0


def test_what_does_not_stack_says_why_and_leaves_nothing(made, tuned, pair):
    one, biases = made("prompt"), made("bitfit")
    for method, words, base, expected in (
        ("qlora", (), one, "it has adapters, whose base would change"),
        ("fusion", (pair[0],), one, "adapters are fused on a whole model only"),
        ("full", (), biases, "stays on its base as bitfit, with weights of its own which method=full would train"),
        ("lora", ("data.length=38",), made("prompt", "prompt.length=12"), "of which base takes 12: set data.length=36"),
        ("prompt", ("data.length=44",), one, "of which prompt takes 3, of which base takes 3: set data.length=42"),
    ):
        run, code, _, err = tuned(method, *words, base=base)
        assert code == 2 and expected in err and not run.exists(), err


def test_a_base_that_another_run_left_is_not_taken_for_its_own(made, tuned, tmp_path):
    (tmp_path / "run" / "base").mkdir(parents=True)
    run, code, _, err = tuned("lora", base=made("prompt"), run=tmp_path / "run")
    assert code == 2 and f"{run / 'base'} is there already, of another run" in err and (run / "base").is_dir()


def test_a_fused_or_stacked_adapter_by_hand_is_still_checked(made, base, tmp_path):
    """The adapter above knows the weights of what is under it."""
    one = made("prompt")
    two = made("lora", base=one)
    model = load_model(base / "model")
    load_adapter(model, one / "adapter", "base_1")
    with torch.no_grad():
        next(iter(tunings_of(model)["base_1"].parameters().values())).mul_(2)
    save_adapter(model, two / "under" / "base_1", base="../../../nowhere")
    with pytest.raises(ValueError, match="it was trained on a base with other weights"):
        load(two)


def test_under_must_be_a_list_of_folders(made, cli):
    run = made("lora", base=made("prompt"))
    (run / "adapter" / "under.json").write_text('{"a": 1}')
    code, _, err = cli("generate", run, "the cat")
    assert code == 2 and "under.json: expected a list of folders" in err


def test_a_group_that_does_not_divide_names_one_that_does(tuned):
    run, code, _, err = tuned("qalora", "qalora.rank=2")
    assert code == 2 and "has 16 inputs, which groups of 32 do not divide: group=16 (qalora.group=16) fits" in err
    assert not run.exists()
    assert tuned("qalora", "qalora.rank=1", "qalora.group=16")[1] == 0


def test_what_was_there_before_a_refused_run_stays(tuned, tmp_path):
    run = tmp_path / "mine"
    (run / "data").mkdir(parents=True)
    (run / "data" / "notes.txt").write_text("mine")
    _, code, _, err = tuned("qalora", "qalora.group=32", run=run)
    assert code == 2 and [path.name for path in run.rglob("*")] == ["data", "notes.txt"], err


def test_a_refusal_stands_on_a_line_of_its_own(tuned):
    """Growing ranks refuse to be compiled when training starts, not after the progress bar."""
    words = ("increlora.interval=1", "increlora.warmup=1", "increlora.winners=4", "train.compile=true")
    _, code, _, err = tuned("increlora", *words)
    assert code == 2 and err.startswith("minillm: error: compile=true"), err
