"""The demo's pictures, and the words that go with each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minillm.generation import temperature, top_k, top_p
from minillm.models import Decoder, attention_maps
from minillm.recipes import plots
from minillm.recipes.report import Picture
from minillm.tokenizers import Tokenizer
from minillm.training import Records


def picture(name: str, facts: Mapping[str, Any], folder: str = "") -> Picture:
    """One of the pictures that `draw` made in the run `folder`, described for those who see it and who do not."""
    alt, caption = {
        "trade_off": (
            _trade_off_alt(facts),
            "What each method gains on the new domain, and forgets of the old.",
        ),
        "loss": (
            "Training loss falling with the steps, for pretraining and for each method.",
            "Training loss: each step (faint) and its running mean.",
        ),
        "learning_rate": (
            "Learning rate rising in the warm-up and falling along a cosine.",
            "The learning rate of each run.",
        ),
        "attention": (
            "Heat maps of attention: each row is a token, each column a token it reads from.",
            f"What two heads of the base's last layer read, token by token, in: {facts['tokenizer']['sentence']}",
        ),
        "next_token": (
            "Bars of the next token's probability, without and with each sampling filter.",
            "The tuned model's next token, before and after each filter; a cross marks what the filter removed.",
        ),
    }[name]
    return Picture((Path(folder) / "plots" / f"{name}.png").as_posix(), alt, caption)


def _trade_off_alt(facts: Mapping[str, Any]) -> str:
    changes = [
        f"{row['method']}: source {facts['base']['losses']['source']:.2f} to {row['losses']['source']:.2f}, "
        f"documentation {facts['base']['losses']['documentation']:.2f} to {row['losses']['documentation']:.2f}"
        for row in facts["methods"]
    ]
    return "Held-out loss before and after. " + "; ".join(changes) + "."


def draw(
    run: Path,
    base: Decoder,
    adapted: Decoder,
    tokenizer: Tokenizer,
    sentence: str,
    prompt: str,
    methods: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """All pictures, into `run/plots`."""
    records = {"pretraining": Records(run / "pretrain" / "metrics.jsonl").read()}
    records |= {name: Records(run / name.replace(" ", "-") / "metrics.jsonl").read() for name in methods}

    def curves(key: str, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        return {name: [(record["step"], record[key]) for record in records[name]] for name in names}

    folder = run / "plots"
    panels = {"Pretraining on documentation": curves("loss", ["pretraining"])}
    plots.plot_losses(folder / "loss.png", panels | {"Tuning to source code": curves("loss", methods)})
    plots.plot_learning_rate(folder / "learning_rate.png", curves("lr", list(records)))
    table = facts["methods"]
    panels = {
        title: (facts["base"]["losses"][domain], [row["losses"][domain] for row in table])
        for title, domain in (("Source code: the gain", "source"), ("Documentation: the forgetting", "documentation"))
    }
    plots.plot_trade_off(folder / "trade_off.png", [row["method"] for row in table], panels)
    ids = torch.tensor([tokenizer.encode(sentence)])
    last = attention_maps(base, ids)[-1][0]  # (H, T, T)
    heads = {f"last layer, head {head + 1}": last[head].numpy() for head in range(min(2, len(last)))}
    plots.plot_attention(folder / "attention.png", tokenizer.pieces(sentence), heads)
    _draw_next_token(folder / "next_token.png", adapted, tokenizer, prompt)


@torch.no_grad()
def _draw_next_token(path: Path, model: Decoder, tokenizer: Tokenizer, prompt: str) -> None:
    logits = model(torch.tensor([tokenizer.encode(prompt)]))[:, -1]
    filters = {
        "none": logits,
        "temperature 0.5": temperature(logits, 0.5),
        "top-k 5": top_k(logits, 5),
        "top-p 0.5": top_p(logits, 0.5),
    }
    shown = logits[0].topk(min(15, logits.shape[-1])).indices
    distributions = {name: kept.softmax(-1)[0, shown].tolist() for name, kept in filters.items()}
    plots.plot_next_token(path, [tokenizer.id_to_piece(i) for i in shown.tolist()], distributions, prompt)
