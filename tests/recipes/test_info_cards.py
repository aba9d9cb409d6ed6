"""`minillm info NAME`: what it prints of a well-known model, and of a folder."""

import json

import pytest

from minillm.files import read_json
from minillm.models import ModelConfig
from minillm.models.cards import CARDS
from minillm.models.memory import training_memory
from minillm.models.size import model_size
from minillm.recipes.info import info
from minillm.recipes.model_info import InfoConfig, describe_costs

GIB = 2**30


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_card_says_what_is_published_of_it(cli):
    """By hand: Llama 3.3 70B caches 2 * 8 heads * 128 features * 80 layers * 2 bytes = 320 KiB a token."""
    code, out, _ = cli("info", "llama-3.3-70b")
    said = words(out)
    assert code == 0 and said.startswith("Llama 3.3 70B kind decoder layers 80 hidden size 8192")
    assert "heads 64 of 128 features, 8 for keys and values" in said and "context 131,072 tokens" in said
    assert "source https://huggingface.co/meta-llama/Llama-3.3-70B-Instruct" in said
    assert "total 70,553,706,496 100.0 %" in said and "embedding 1,050,673,152 1.5 %" in said
    assert f"bfloat16 {2 * 70_553_706_496 / GIB:.1f} GiB" in said
    assert "cache per token 320.0 KiB" in said and "cache at full context 40.0 GiB" in said


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_a_page_with_its_numbers(name):
    said, card = words(info(name)), CARDS[name]
    size = model_size(card.config)
    assert said.startswith(card.title) and card.source in said and f"{card.context:,} tokens" in said
    for part, count in size.parameters.items():
        assert f"{part} {count:,} {100 * count / size.total:.1f} %" in said
    assert ("published" in said) == (card.more > 0) and (card.more == 0 or f"{size.total + card.more:,} param" in said)
    assert f"LoRA {size.lora_parameters():,}" in said and f"full fine-tuning {size.total:,}" in said
    assert ("cache per token" in said) == (card.config.kind != "encoder")


def test_the_memory_of_the_page_is_the_estimate():
    config = CARDS["qwen2.5-7b"].config
    options = InfoConfig(batch_size=2, length=2048, rank=16, targets=("all-linear",))
    lora = {"batch_size": 2, "length": 2048, "rank": 16, "targets": ("all-linear",)}
    plain, again = (training_memory(config, "qlora", checkpointing=on, **lora) for on in (False, True))
    said = words(describe_costs(config, options))
    assert "batch 2 x 2048 tokens, bfloat16, rank 16 on all-linear" in said
    row = said.partition("QLoRA ")[2]
    assert row.startswith(f"{plain.trained:,} {plain.weights / GIB:.1f} GiB")
    assert f"{plain.peak / GIB:.1f} GiB {again.peak / GIB:.1f} GiB" in row


def test_all_cards_in_one_table(cli):
    code, out, _ = cli("info", "models")
    lines = {line.split()[0]: words(line) for line in out.splitlines() if line}
    assert code == 0 and set(CARDS) <= set(lines)
    assert lines["gpt2"] == "gpt2 GPT-2 small 124,439,808 1,024 237.4 MiB 36.0 KiB"
    assert lines["bert-base"].endswith("512 207.7 MiB -")


def test_an_unknown_name_is_answered_with_the_nearest_and_all(cli):
    code, _, error = cli("info", "lama-3")
    assert code == 2 and "'lama-3'; did you mean llama-3." in error
    assert "There are llama-3.3-70b, " in error and "mbart-50.\nNor is there a folder lama-3 in " in error


def test_a_card_s_name_is_no_folder_and_a_path_is(base, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").symlink_to(base)
    assert cli("info", "gpt2")[1].startswith("GPT-2 small")
    assert cli("info", "./gpt2")[1].startswith("run gpt2")


def test_a_folder_of_ours_says_what_its_model_costs(base, cli):
    code, out, _ = cli("info", base)
    config = ModelConfig(**read_json(base / "model" / "config.json")["model"])
    assert code == 0 and f"full fine-tuning {model_size(config).total:,}" in words(out)
    assert "tokens, bfloat16, rank 8 on q_proj, v_proj" in words(out) and "batch 1 x 48 tokens" in words(out)


def test_a_folder_of_the_hub_is_read_by_its_config(cli, tmp_path):
    from transformers import GPT2Config

    fields = GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=101).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code, out, error = cli("info", tmp_path)
    total = 101 * 48 + 64 * 48 + 3 * (12 * 48 * 48 + 13 * 48) + 2 * 48  # GPT-2's count, as its authors' code has it
    assert (code, error) == (0, "") and f"total {total:,} 100.0 %" in words(out) and "hidden_size 48" in words(out)


def test_the_bars_are_drawn(tmp_path):
    options = InfoConfig(plot=str(tmp_path / "memory.png"))
    info("gpt2", options)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_option_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=0: at least 1; rank=-1: at least 1"):
        InfoConfig(batch_size=0, rank=-1)
