"""The commands of `minillm`, as data: nothing is imported until one is called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """A sub-command: what --help says, and the recipe behind it with its config (as "module:name", imported late)."""

    summary: str
    example: str
    recipe: str
    config: str = ""
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # besides key=value, as argparse wants it
    presets: str = ""  # the function that gives the config for the name behind --preset, "module:name"


RESUME = {"--resume": {"action": "store_true", "help": "continue the run in run=FOLDER exactly where it was stopped"}}
FOLDER = {"folder": {"help": "a run, model or adapter folder"}}
COMMANDS = {
    "demo": Command(
        "text of this Python -> tokenizer -> language model -> three ways of tuning it -> report",
        "minillm demo run=runs/demo",
        "minillm.recipes.demo:demo",
        "minillm.recipes.demo:DemoConfig",
    ),
    "tokenizer train": Command(
        "learn a tokenizer from text",
        "minillm tokenizer train data.train=my_folder/ tokenizer.vocab_size=2000 run=runs/tokenizer",
        "minillm.recipes.tokenizer:train_tokenizer",
        "minillm.recipes.tokenizer:TokenizerRunConfig",
    ),
    "tokenizer show": Command(
        "the pieces and ids that a tokenizer makes of a text",
        'minillm tokenizer show runs/tokenizer "Once upon a time"',
        "minillm.recipes.tokenizer:show_tokens",
        arguments={
            "folder": {"help": "a tokenizer, run, model or adapter folder"},
            "text": {"help": 'the text; "-" reads it from standard input'},
        },
    ),
    "pretrain": Command(
        "train a language model on text of your own; works under torchrun",
        "minillm pretrain data.train=my_folder/ run=runs/base train.steps=2000\n"
        "minillm pretrain run=runs/base --resume\n"
        "minillm pretrain model.kind=encoder data.train=my_folder/ run=runs/encoder\n"
        "minillm pretrain --preset nano-decoder data.train=my_folder/ run=runs/nano\n"
        "torchrun --nproc_per_node=2 -m minillm pretrain data.train=my_folder/ run=runs/base",
        "minillm.recipes.pretrain:pretrain",
        "minillm.recipes.pretrain:PretrainConfig",
        {
            **RESUME,
            "--preset": {
                "metavar": "NAME",
                "help": "begin from a base's config: tiny- or nano- with encoder, decoder or encdec, tiny-encoder-sl",
            },
        },
        "minillm.recipes.bases.presets:preset",
    ),
    "bases prepare": Command(
        "make the training text, the held-out text and the tokenizer of the bases in the box from corpora's folders",
        "minillm bases prepare language=english data=corpora/ out=runs/english",
        "minillm.recipes.bases.prepare:prepare",
        "minillm.recipes.bases.prepare:PrepareConfig",
    ),
    "bases export": Command(
        "make a finished run of minillm pretrain a model in the box, with a card of how it came and how good it is",
        "minillm bases export run=runs/tiny-encoder name=tiny-encoder manifest=runs/english/manifest.json",
        "minillm.recipes.bases.export:export",
        "minillm.recipes.bases.export:ExportConfig",
    ),
    "tune": Command(
        "adapt a model to other text or to naming classes, by any of `minillm methods`; works under torchrun",
        "minillm tune base=runs/base method=lora data.train=notes.jsonl run=runs/notes\n"
        "minillm tune base=runs/base method=bitfit data.train=reviews.csv data.label=sentiment run=runs/reviews\n"
        "minillm tune base=runs/base method=fusion adapters=a:runs/one,b:runs/two data.train=notes.jsonl run=runs/both",
        "minillm.recipes.tune:tune",
        "minillm.recipes.tune_config:TuneConfig",
        RESUME,
    ),
    "compare": Command(
        "one fair scoreboard of all methods, on one base and one task; several processes may share it",
        "minillm compare base=tiny-encoder task=sentiment methods=all seeds=5 run=runs/sentiment\n"
        "minillm compare base=tiny-encoder task=sentiment --quick\n"
        "minillm compare base=runs/base task=reviews.csv methods=head,full,lora run=runs/reviews\n"
        "torchrun --nproc_per_node=2 -m minillm compare base=tiny-encoder task=sentiment run=runs/sentiment",
        "minillm.recipes.compare:compare",
        "minillm.recipes.compare:CompareConfig",
        {"--quick": {"action": "store_true", "help": "a first look in less than five minutes on two cores"}},
    ),
    "methods": Command(
        "all ways of tuning, and what each would train in a model",
        "minillm methods\nminillm methods runs/base\nminillm methods llama-3.2-1b",
        "minillm.recipes.methods:methods",
        arguments={"folder": {"nargs": "?", "help": "a model card or a folder with a model; none: gpt2"}},
    ),
    "tasks": Command(
        "all tasks to tune a model for, or examples of one; a file or folder of your own is a task too",
        "minillm tasks\nminillm tasks sentiment --split test\nminillm tasks reviews.csv\n"
        "minillm tasks nli --save data/nli",
        "minillm.recipes.tasks_command:tasks",
        arguments={
            "name": {"nargs": "?", "help": "a task, a domain, or a file or folder of your own; none: the list of all"},
            "--split": {
                "choices": ("train", "valid", "test"),
                "default": "train",
                "help": "of which records are shown",
            },
            "--count": {"type": int, "default": 10, "help": "how many (10 if not given)"},
            "--seed": {"type": int, "default": 0, "help": "of a task that is made here, or of a cut"},
            "--folder": {"help": "where the files of a published set lie"},
            "--save": {"metavar": "FOLDER", "help": "write all records there, a .jsonl file for each split"},
        },
    ),
    "generate": Command(
        "continue a prompt",
        'minillm generate runs/notes "Once upon a time" temperature=0.8 top_p=0.95 --stream',
        "minillm.recipes.generate:generate",
        "minillm.recipes.generate:GenerateConfig",
        {
            **FOLDER,
            "prompt": {"help": 'the text to continue; "-" reads it from standard input'},
            "--stream": {"action": "store_true", "help": "show the text while it is made"},
        },
    ),
    "classify": Command(
        "the class of a text, by a model tuned with data.label",
        'minillm classify runs/reviews "a charming and often affecting journey"',
        "minillm.recipes.classify:classify",
        "minillm.recipes.classify:ClassifyConfig",
        {**FOLDER, "text": {"help": 'the text; "-" reads it from standard input'}},
    ),
    "info": Command(
        "what runs here, what a folder holds, or how large a well-known language model is",
        "minillm info runs/notes\nminillm info llama-3.3-70b length=4096\nminillm info models",
        "minillm.recipes.info:info",
        "minillm.recipes.model_info:InfoConfig",
        {
            "folder": {
                "nargs": "?",
                "help": "a run, model, adapter or tokenizer folder, the name of a well-known model, or `models` for "
                "all of them; none: this machine",
            }
        },
    ),
    "kernels build": Command(
        "compile the native kernels of the ops with this machine's g++ and nvcc",
        "minillm kernels build\nminillm kernels build cuda",
        "minillm.recipes.kernels:build_kernels",
        arguments={
            "kind": {
                "nargs": "?",
                "choices": ("cpu", "cuda", "emulated"),
                "help": "emulated: the cuda kernels for a GPU that the processor plays; none: cuda where torch sees "
                "a GPU, else cpu",
            }
        },
    ),
    "kernels info": Command(
        "which implementation of each op runs here, and why a faster one does not; which kernels are built",
        "minillm kernels info",
        "minillm.recipes.kernels:describe_kernels",
    ),
    "kernels emulate": Command(
        "run a CUDA kernel of attention on a GPU that the processor plays, and say what it did and whether it is right",
        "minillm kernels emulate attention --stage v2 --trace\n"
        "minillm kernels emulate attention --stage v4 --mutant 403",
        "minillm.recipes.kernels:emulate_kernel",
        arguments={
            "op": {"choices": ("attention",)},
            "--stage": {
                "choices": ("v1", "v2", "v3", "v4", "v5"),
                "default": "v2",
                "help": "which kernel (v2 if not given)",
            },
            "--trace": {"action": "store_true", "help": "tell what one block does, barrier by barrier"},
            "--block": {"type": int, "default": 0, "help": "its number in the grid"},
            "--queries": {"type": int, "default": 64},
            "--keys": {"type": int, "default": 64},
            "--features": {"type": int, "default": 32, "help": "of a head"},
            "--schedule": {
                "choices": ("forward", "reverse", "shuffled"),
                "default": "forward",
                "help": "in which order the threads of a block take their turns",
            },
            "--mutant": {
                "type": int,
                "default": 0,
                "help": "a line to leave out, by its number in csrc/cuda/MUTANTS.md",
            },
        },
    ),
    "kernels clean": Command(
        "remove all kernels that were built, and what interrupted builds left",
        "minillm kernels clean",
        "minillm.recipes.kernels:clean_kernels",
    ),
}
