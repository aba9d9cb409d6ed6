"""One picture of vanishing and exploding gradients: several models on the same tokens."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from minillm.models.gradient_flow import gradient_flow
from minillm.recipes.plots import COLOURS, new_figure


def plot_gradient_flow(
    models: Mapping[str, nn.Module], tokens: Tensor, path: str | Path, max_lag: int | None = None
) -> dict[str, Tensor]:
    """Draw `gradient_flow` of each named model on tokens (B, T) to the PNG file `path`; return what is drawn.

    Each curve is divided by its value at lag 0, for models differ in scale: what it shows is how much of the gradient
    is left. `max_lag` is half the length unless given.

    Example: `plot_gradient_flow({"RNN": rnn, "LSTM": lstm, "attention": decoder}, tokens, "gradient_flow.png")`
    """
    if not models:
        raise ValueError("no models to draw: give a name for each, {'LSTM': lstm}")
    max_lag = tokens.shape[1] // 2 if max_lag is None else max_lag
    flows = {name: gradient_flow(model, tokens, max_lag) for name, model in models.items()}
    if dead := [name for name, flow in flows.items() if not 0 < flow[0] < float("inf")]:
        raise ValueError(
            f"nothing can be compared to a gradient at lag 0 that is zero or not finite: {', '.join(dead)}"
        )
    curves = {name: flow / flow[0] for name, flow in flows.items()}
    with new_figure(path) as (axes,):
        for colour, (name, curve) in zip(COLOURS * 2, curves.items(), strict=False):
            axes.plot(range(max_lag + 1), curve.cpu(), color=colour, label=name)
        axes.set(xlabel="lag k (steps back)", ylabel="|d loss$_t$ / d h$_{t-k}$|, at lag 0 = 1", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
        axes.set_title("How much gradient is left")
        axes.legend()
    return curves
