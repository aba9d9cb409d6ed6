"""Several languages in one run: how often each is drawn, and a loader that draws them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from minillm.config import seed_flaw
from minillm.data.loader import Loader


def sampling_probabilities(
    sizes: Mapping[str, float], *, alpha: float | None = None, temperature: float | None = None
) -> dict[str, float]:
    """p_i proportional to (n_i / N)^alpha, where n_i is the size of language i (its tokens, say) and N their sum.

    alpha = 1 draws languages as they are, 0 all alike; between them small languages are heard more often than their
    size says and large ones less. `temperature` = 1 / alpha is the same knob by its other name: give one of them.
    alpha in the literature: mBERT 0.7 (google-research/bert, multilingual.md), XLM 0.5 (Lample and Conneau 2019,
    arXiv:1901.07291, section 3.1), mBART 0.7 (Liu et al. 2020, arXiv:2001.08210, section 2.1), XLM-R 0.3 (Conneau et
    al. 2019, arXiv:1911.02116, section 3.1).
    """
    wrong = []
    if (alpha is None) == (temperature is None):
        wrong.append("give either alpha or temperature")
    if alpha is not None and not 0 <= alpha < math.inf:
        wrong.append(f"alpha {alpha} must be a number, at least 0")
    if temperature is not None and not temperature > 0:
        wrong.append(f"temperature {temperature} must be above 0 (at 0 only the largest language would be left)")
    if not sizes:
        wrong.append("there is no language")
    if bad := [f"{name} ({size})" for name, size in sizes.items() if not 0 < size < math.inf]:
        wrong.append(f"languages without text, or without a size: {', '.join(bad)}")
    if wrong:
        raise ValueError("sampling_probabilities: " + "; ".join(wrong))
    power = 1 / temperature if alpha is None else alpha
    largest = max(sizes.values())  # against it no power overflows
    shares = {name: (size / largest) ** power for name, size in sizes.items()}
    total = math.fsum(shares.values())
    return {name: share / total for name, share in shares.items()}


class MixedLoader:
    """Batches without end, each of one language, drawn with its probability: as XLM does.

    loaders: by name, each with its own objective and row length; equal batch sizes make the share of batches the share
    of rows. All ranks draw the same language. The draw is a function of (seed, number of the batch), so a resumed run
    goes on exactly.

    Example: MixedLoader(loaders, sampling_probabilities({"sl": len(sl), "en": len(en)}, alpha=0.3))
    """

    def __init__(self, loaders: Mapping[str, Loader], probabilities: Mapping[str, float], seed: int = 0):
        wrong = []
        if not loaders or loaders.keys() != probabilities.keys():
            wrong.append(f"loaders for {sorted(loaders)} and probabilities for {sorted(probabilities)} must agree")
        if bad := {name: p for name, p in probabilities.items() if not 0 <= p <= 1}:
            wrong.append(f"probabilities must be from 0 to 1, got {bad}")
        elif abs(math.fsum(probabilities.values()) - 1) > 1e-6:
            wrong.append(f"probabilities sum to {math.fsum(probabilities.values())}, not to 1")
        wrong += seed_flaw(seed)
        if wrong:
            raise ValueError("MixedLoader: " + "; ".join(wrong))
        self.loaders, self.seed = {name: loaders[name] for name in sorted(loaders)}, seed  # the order decides draws
        self.probabilities = {name: float(probabilities[name]) for name in self.loaders}
        self.step = 0  # batches given

    def draw(self, step: int) -> str:
        """The name of the loader that gives batch number `step`."""
        # 3 keeps it apart from the streams of the loaders
        place = np.random.default_rng([self.seed, step, 3]).random() * math.fsum(self.probabilities.values())
        sums = np.cumsum(list(self.probabilities.values()))
        at = min(int(np.searchsorted(sums, place, side="right")), len(sums) - 1)
        return list(self.loaders)[at]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        name = self.draw(self.step)
        self.step += 1
        return next(self.loaders[name])

    def identity(self) -> dict[str, Any]:
        """What decides which loader is next; each loader has its own identity in its own state."""
        return {"loader": "MixedLoader", "seed": self.seed, "probabilities": self.probabilities}

    def state_dict(self) -> dict[str, Any]:
        """Where this loader and each of its loaders stand; JSON-able."""
        loaders = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"step": self.step, "identity": self.identity(), "loaders": loaders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. If it is of other loaders, nothing moves and a ValueError lists all that differs."""
        wrong = [
            f"{key}: saved {state['identity'].get(key)!r}, now {value!r}"
            for key, value in self.identity().items()
            if state["identity"].get(key) != value
        ]
        before = self.state_dict()["loaders"]
        for name in self.loaders.keys() & state.get("loaders", {}).keys():
            try:
                self.loaders[name].load_state_dict(state["loaders"][name])
            except ValueError as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            for name, loader in self.loaders.items():
                loader.load_state_dict(before[name])
            raise ValueError("this loader cannot continue from that state:\n" + "\n".join(wrong))
        self.step = state["step"]
