"""A token file as rows of a batch: packed, documents end to end, or padded, one document each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor, nn

from minillm.data import PackedLoader, PaddedLoader, TokenFile, sequential_batches
from minillm.data.loader import Loader
from minillm.evaluation import language_model_loss
from minillm.recipes.common import DataConfig, say
from minillm.training import Evaluate, causal_lm_loss, world


@dataclass(frozen=True)
class Rows:
    """How a text is cut, for training (`loader`) and for measuring (`batches`, `measure`) alike."""

    file: TokenFile
    data: DataConfig
    padded: bool = False
    loss_fn: Callable = causal_lm_loss

    def loader(self) -> Loader:
        """Endless batches for this process, shuffled by the config's seed."""
        common = (self.file, self.data.batch_size, self.data.length, self.data.seed, world().rank, world().size)
        if self.padded:
            return PaddedLoader(*common)
        return PackedLoader(*common, isolate_documents=self.data.isolate_documents, random_offset=True)

    def batches(self) -> Iterable[Mapping[str, Tensor]]:
        """One pass over the text in order."""
        size, length = self.data.batch_size, self.data.length
        if not self.padded:
            return sequential_batches(self.file, size, length, isolate_documents=self.data.isolate_documents)
        loader = PaddedLoader(self.file, min(size, self.file.meta.num_documents), length, shuffle=False)
        rows = loader.rows(0)
        return (loader.batch(rows[i : i + size], slice(None)) for i in range(0, len(rows), size))

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss, perplexity and tokens over the whole text; bits per byte where no document loses its end."""
        whole = not self.padded or int(np.max(self.file.ends - self.file.starts)) - 1 <= self.data.length
        size = self.file.meta.counted_bytes if whole else None
        return language_model_loss(model, self.batches(), num_bytes=size, loss_fn=self.loss_fn)

    def evaluation(self) -> Evaluate:
        """The callback that measures the first `eval_batches` batches during training."""
        some = self.data.eval_batches or None
        return Evaluate(lambda model: language_model_loss(model, islice(self.batches(), some), loss_fn=self.loss_fn))


def padded(file: TokenFile, config: DataConfig) -> bool:
    """Whether each document has a row of its own; said to the user, with the reason."""
    prompts = bool((file.counted > file.starts).any())
    found = prompts if config.rows == "auto" else config.rows == "padded"
    why = f"there are {'prompts' if prompts else 'no prompts'}" if config.rows == "auto" else f"data.rows={config.rows}"
    if found and config.isolate_documents:
        raise ValueError(f"data.isolate_documents=true is for packed rows, and these are padded ({why}): leave it out")
    kind = "padded rows, one document each" if found else "packed rows, documents end to end"
    say(f"{kind} ({why}): {file.meta.num_documents:,} documents, {len(file):,} tokens")
    return found
