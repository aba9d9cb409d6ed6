"""Gates in a model's `hidden`: who is led through them, in which order, and that nothing else changes."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from minillm.generation import generate_tokens
from minillm.models import HeadConfig, ModelConfig, build, put_head
from minillm.models.build import build_body
from minillm.peft.doors import Door, enter, entrances, gates, leave, positions_taken
from minillm.peft.names import Gate

SMALL = dict(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, max_positions=64)


class Times(Gate):
    """Multiplies what comes out, and adds to what is asked first: order shows."""

    leaf = "times"

    def __init__(self, factor: float, plus: float = 0.0):
        super().__init__()
        self.factor, self.plus, self.seen = nn.Parameter(torch.tensor(factor)), plus, []

    def hidden(self, call, *args, **options):
        self.seen.append(call.model)
        return call(*args, **options) * self.factor + self.plus


def test_entrances_are_below_heads(tiny_decoder):
    encoder = build(ModelConfig(kind="encoder", **SMALL))
    both = build(ModelConfig(kind="encoder_decoder", **SMALL))
    assert entrances(tiny_decoder) == [("", tiny_decoder)]
    assert entrances(encoder) == [("", encoder)] and entrances(both) == [("", both)]
    for task in ("classification", "masked_lm", "tagging", "span", "choice", "embedding"):
        body = build_body(ModelConfig(kind="encoder", **SMALL))
        assert entrances(put_head(body, HeadConfig(task=task))) == [("body", body)]


def test_other_models_have_no_entrance():
    assert entrances(nn.Linear(2, 2)) == [] and entrances(nn.TransformerEncoderLayer(8, 2)) == []


def test_forward_generation_and_direct_calls_pass_the_gate(tiny_decoder, tokens):
    gate, before = Times(-1.0), tiny_decoder.hidden(tokens)
    enter(tiny_decoder, "", gate)
    assert torch.equal(tiny_decoder.hidden(tokens), -before)
    assert torch.equal(tiny_decoder(tokens), tiny_decoder.lm_head(-before))
    first = generate_tokens(tiny_decoder, tokens, max_new_tokens=1)[:, 0]
    assert torch.equal(first, tiny_decoder.lm_head(-before[:, -1]).argmax(-1))
    assert all(model is tiny_decoder for model in gate.seen)


def test_a_head_passes_the_gate_of_its_body(tokens):
    model = put_head(build_body(ModelConfig(kind="encoder", **SMALL)), HeadConfig(dropout=0.0, dense=None)).eval()
    states = model.body.hidden(tokens)
    enter(model, "body", Times(3.0))
    torch.testing.assert_close(model(tokens), model.classifier(3.0 * states[:, 0]))


def test_gates_stand_one_before_the_other_and_leave_together(tiny_decoder, tokens):
    before, keys = tiny_decoder.hidden(tokens), list(tiny_decoder.state_dict())
    first, second = Times(2.0, plus=1.0), Times(5.0)
    enter(tiny_decoder, "", first)
    enter(tiny_decoder, "", second)
    assert gates(tiny_decoder) == [first, second]
    torch.testing.assert_close(tiny_decoder.hidden(tokens), (before * 2 + 1) * 5)  # the newest is outermost
    assert [name for name in tiny_decoder.state_dict() if name not in keys] == ["times.factor", "times_2.factor"]
    assert leave(tiny_decoder) == [first, second] and leave(tiny_decoder) == []
    assert list(tiny_decoder.state_dict()) == keys and "hidden" not in vars(tiny_decoder)
    assert torch.equal(tiny_decoder.hidden(tokens), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_gates(tiny_decoder, tokens, copied):
    enter(tiny_decoder, "", Times(2.0))
    double = tiny_decoder.hidden(tokens)
    twin = copied(tiny_decoder)
    with torch.no_grad():
        twin.times.factor.fill_(7.0)
    torch.testing.assert_close(twin.hidden(tokens), double * 3.5)
    assert twin.times.seen[-1] is twin and twin.hidden.model is twin
    assert torch.equal(tiny_decoder.hidden(tokens), double)


def test_others_see_what_hidden_takes(tiny_decoder):
    before = inspect.signature(tiny_decoder.hidden)
    enter(tiny_decoder, "", Times(2.0))
    assert inspect.signature(tiny_decoder.hidden) == before and "cache" in before.parameters


def test_a_compiled_hidden_is_not_taken_out_silently(tiny_decoder):
    tiny_decoder.hidden = torch.compile(tiny_decoder.hidden, backend="eager")
    with pytest.raises(ValueError, match="tune the model first, and compile it afterwards"):
        enter(tiny_decoder, "", Times(2.0))
    assert gates(tiny_decoder) == []


def test_positions_of_all_gates_add_up(tiny_decoder):
    assert positions_taken(tiny_decoder) == 0
    for taken in (3, 4):
        gate = Times(1.0)
        gate.positions = taken
        enter(tiny_decoder, "", gate)
    assert positions_taken(tiny_decoder) == 7


def test_a_door_without_gates_is_the_class_s_own(tiny_decoder, tokens):
    assert torch.equal(Door(tiny_decoder)(tokens), tiny_decoder.hidden(tokens))
