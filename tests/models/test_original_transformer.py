"""The transformer of Vaswani et al. 2017, whole: torch.nn with the same weights has the same outputs and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.models import EncoderDecoder, ModelConfig, build

D, V = 12, 17
EXACT = dict(rtol=0, atol=1e-10)  # float64, a few hundred operations on numbers near 1
ORIGINAL = dict(
    kind="encoder_decoder",
    positions="sinusoidal",
    norm="layer",
    norm_first=False,
    mlp="plain",
    activation="relu",
    attention_bias=True,
    mlp_bias=True,
)


def original(**fields) -> EncoderDecoder:
    sizes = dict(vocab_size=V, hidden_size=D, num_layers=2, num_heads=3, intermediate_size=20, max_positions=32)
    model = build(ModelConfig(**ORIGINAL | sizes | fields)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(parameter.dim() == 1)
    return model


class Twin(nn.Module):
    """torch's two stacks between our model's embeddings and our LM head, each used once, as a matrix of its own."""

    def __init__(self, ours: EncoderDecoder):
        super().__init__()
        c = ours.config
        options = dict(dropout=0.0, layer_norm_eps=c.norm_eps, batch_first=True, norm_first=c.norm_first)
        sizes = (D, c.num_heads, c.intermediate_size)
        final = [nn.LayerNorm(D, c.norm_eps) if c.norm_first else None for _ in range(2)]
        encoder = nn.TransformerEncoderLayer(*sizes, **options)
        self.encoder = nn.TransformerEncoder(encoder, c.num_layers, final[0], enable_nested_tensor=False)
        decoder = nn.TransformerDecoderLayer(*sizes, **options)
        self.decoder = nn.TransformerDecoder(decoder, c.num_decoder_layers, final[1])
        self.embed = nn.ParameterList(ours.embed_tokens.weight.detach().clone() for _ in range(3))
        self.double()
        with torch.no_grad():
            for mine, other, part in self.pairs(ours):
                other[part].copy_(mine)

    def pairs(self, ours: EncoderDecoder):
        """(our parameter, torch's, which rows of it): torch keeps queries, keys and values in one matrix."""
        for blocks, layers in ((ours.encoder.layers, self.encoder.layers), (ours.decoder.layers, self.decoder.layers)):
            for block, layer in zip(blocks, layers, strict=True):
                yield from _block_pairs(block, layer)
        if ours.config.norm_first:
            for mine, other in ((ours.encoder.norm, self.encoder.norm), (ours.decoder.norm, self.decoder.norm)):
                yield from _pairs(mine, other)

    def forward(self, source, source_mask, tokens, mask):
        memory = self.encoder(self.vectors(0, source, source_mask), src_key_padding_mask=~source_mask)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return F.linear(
            self.decoder(
                self.vectors(1, tokens, mask),
                memory,
                tgt_mask=future,
                tgt_key_padding_mask=~mask,
                memory_key_padding_mask=~source_mask,
            ),
            self.embed[2],
        )

    def vectors(self, side, tokens, mask):
        """sqrt(D) embedding + the paper's sinusoid of the number of real tokens before, section 3.4 and 3.5."""
        table = torch.tensor([[paper_sinusoid(p, i) for i in range(D)] for p in range(tokens.shape[1])])
        rows = [[sum(row[:t]) if row[t] else 0 for t in range(len(row))] for row in mask.tolist()]
        return F.embedding(tokens, self.embed[side]) * math.sqrt(D) + table.double()[torch.tensor(rows)]


def paper_sinusoid(position: int, feature: int) -> float:
    angle = position / 10000 ** ((feature - feature % 2) / D)
    return math.cos(angle) if feature % 2 else math.sin(angle)


def _block_pairs(block, layer):
    cross = [] if block.cross_attn is None else [(block.cross_attn, layer.multihead_attn)]
    for attention, other in [(block.self_attn, layer.self_attn), *cross]:
        for i, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
            yield projection.weight, other.in_proj_weight, slice(i * D, (i + 1) * D)
            yield projection.bias, other.in_proj_bias, slice(i * D, (i + 1) * D)
        yield from _pairs(attention.o_proj, other.out_proj)
    norms = [block.attn_norm, block.mlp_norm] if not cross else [block.attn_norm, block.cross_attn_norm, block.mlp_norm]
    for i, norm in enumerate(norms):
        yield from _pairs(norm, getattr(layer, f"norm{i + 1}"))
    yield from _pairs(block.mlp.up_proj, layer.linear1)
    yield from _pairs(block.mlp.down_proj, layer.linear2)


def _pairs(mine: nn.Module, other: nn.Module):
    for name, parameter in mine.named_parameters():
        yield parameter, getattr(other, name), slice(None)


class ExactSinusoids(nn.Module):
    """Our table is float32's; for a comparison to ten digits it has to be float64's."""

    def forward(self, positions):
        table = torch.tensor([[paper_sinusoid(p, i) for i in range(D)] for p in range(int(positions.max()) + 1)])
        return table.double()[positions]


def padding(lengths: list[int], width: int, side: str) -> torch.Tensor:
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return mask if side == "right" else mask.flip(1)


CASES = {  # source lengths, target lengths, side of the padding
    "one row, longer source": ([7], [4], "right"),
    "one token each": ([1], [1], "right"),
    "longer target": ([3, 3], [8, 8], "right"),
    "padding on the right": ([6, 2, 1], [5, 3, 4], "right"),
    "padding on the left": ([6, 2, 1], [5, 3, 4], "left"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fields", [{}, dict(norm_first=True), dict(num_decoder_layers=1)], ids=str)
def test_outputs_and_all_gradients_equal_torchs(case, fields):
    source_lengths, lengths, side = CASES[case]
    ours = original(**fields)
    theirs = Twin(ours)
    ours.encoder.embed_positions = ours.decoder.embed_positions = ExactSinusoids()
    source_mask, mask = padding(source_lengths, max(source_lengths), side), padding(lengths, max(lengths), side)
    source, tokens = torch.randint(0, V, source_mask.shape), torch.randint(0, V, mask.shape)
    given = ours(source, tokens, source_mask=source_mask, mask=mask)
    expected = theirs(source, source_mask, tokens, mask)
    torch.testing.assert_close(given[mask], expected[mask], **EXACT)
    weight = torch.randn_like(given[mask])
    (given[mask] * weight).sum().backward()
    (expected[mask] * weight).sum().backward()
    seen = 0
    for mine, other, part in theirs.pairs(ours):
        torch.testing.assert_close(mine.grad, other.grad[part], rtol=1e-9, atol=1e-10)
        seen += mine.numel()
    embedding = ours.embed_tokens.weight
    torch.testing.assert_close(embedding.grad, sum(copy.grad for copy in theirs.embed), rtol=1e-9, atol=1e-10)
    assert seen + embedding.numel() == sum(parameter.numel() for parameter in ours.parameters())


def test_the_models_own_sinusoids_are_the_papers():
    model = original()
    vectors = model.encoder.embed_positions(torch.arange(32))
    paper = torch.tensor([[paper_sinusoid(p, i) for i in range(D)] for p in range(32)])
    torch.testing.assert_close(vectors, paper, rtol=0, atol=1e-5)  # angles up to 31 in float32
    read = []
    for stack in (model.encoder, model.decoder):
        stack.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    tokens = torch.randint(0, V, (2, 5))
    model(tokens, tokens)
    expected = model.embed_tokens(tokens) * math.sqrt(D) + paper[:5]
    for given in read:
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_post_norm_has_no_final_norm():
    assert not [name for name, _ in original().named_parameters() if name.endswith("coder.norm.weight")]
    assert [name for name, _ in original(norm_first=True).named_parameters() if name.endswith("coder.norm.weight")]
