"""What model folders leave unsaid, as data: customary special tokens, input formats, ids of sentencepiece pieces.

A folder names its family by `tokenizer_class` in tokenizer_config.json or `model_type` in config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CONTROL = ("<unk>", "<s>", "</s>")  # sentencepiece's own first pieces, in this order, where a family moves them


@dataclass(frozen=True)
class Layout:
    """How the ids of a sentencepiece model become a checkpoint's ids: piece i -> moved[i], or else i + offset.

    before: names of the ids that no piece has, ahead of the pieces; after: names that follow the last piece.
    prepare: "lower" and "strip_accents" are done to the text before sentencepiece sees it.
    """

    offset: int = 0
    moved: Mapping[int, int] = field(default_factory=dict)
    before: Mapping[str, int] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Customary special tokens by role, and the input format in the words of `InputFormat.parse`.

    "lang" in a format stands for the language code, for which `language` is the default.
    """

    roles: Mapping[str, str]
    single: str
    pair: str
    layout: Layout | None = None
    language: str | None = None


_BERT = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_ROBERTA = {
    "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>",
}  # fmt: skip
_ALBERT = {
    "bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "pad": "<pad>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]",
}  # fmt: skip
_T5_EXTRA = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))  # the sentinels count down to the end of the ids

# mBART's 25 languages (Liu et al. 2020, arXiv:2001.08210) and the 27 that mBART-50 adds (Tang et al. 2020,
# arXiv:2008.00401), in the order of their ids
MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
)
MBART50 = MBART + (
    " af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE "
    "ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)

# fairseq keeps its dictionary's four specials and puts sentencepiece's pieces after them: everything moves by one
_FAIRSEQ = {"offset": 1, "moved": {0: 3, 1: 0, 2: 2}, "before": {"<pad>": 1}}
# CamemBERT's fairseq dictionary came on top of a sentencepiece model that already had them: its own go unused
_CAMEMBERT = Layout(
    offset=4,
    moved={0: 3},
    before={"<s>NOTUSED": 0, "<pad>": 1, "</s>NOTUSED": 2, "<unk>NOTUSED": 4},
    after=("<mask>",),
)


def _languages(codes: str) -> Layout:
    return Layout(**_FAIRSEQ, after=(*codes.split(), "<mask>"))


FAMILIES: dict[str, Family] = {
    "gpt2": Family(dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"), "A", "A B:1"),
    "bert": Family(_BERT, "cls A sep", "cls A sep B:1 sep:1"),
    "roberta": Family(_ROBERTA, "cls A sep", "cls A sep sep B sep"),
    "llama": Family({"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, "bos A", "bos A bos:1 B:1", Layout()),
    "gemma": Family(
        {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}, "bos A", "bos A bos:1 B:1", Layout()
    ),
    "t5": Family(
        {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, "A eos", "A eos B eos", Layout(after=_T5_EXTRA)
    ),
    "albert": Family(_ALBERT, "cls A sep", "cls A sep B:1 sep:1", Layout(prepare=("strip_accents", "lower"))),
    "camembert": Family(_ROBERTA, "bos A eos", "bos A eos eos B eos", _CAMEMBERT),
    "xlmroberta": Family(_ROBERTA, "bos A eos", "bos A eos eos B eos", Layout(**_FAIRSEQ, after=("<mask>",))),
    "nllb": Family(_ROBERTA, "lang A eos", "lang A B eos", language="eng_Latn"),
    "mbart": Family(_ROBERTA, "A eos lang", "A B eos lang", _languages(MBART), "en_XX"),
    "mbart50": Family(_ROBERTA, "lang A eos", "lang A B eos", _languages(MBART50), "en_XX"),
}  # fmt: skip

SAME_AS = {
    "distilbert": "bert", "electra": "bert", "mobilebert": "bert", "bart": "roberta",
    "distilroberta": "roberta", "longformer": "roberta", "mt5": "t5", "umt5": "t5", "longt5": "t5",
    "switchtransformers": "t5",
    "mistral": "llama", "mixtral": "llama", "codellama": "llama", "gemma2": "gemma", "gemma3text": "gemma",
    "gptneo": "gpt2", "gptneox": "gpt2", "codegen": "gpt2", "phi": "gpt2", "xlmr": "xlmroberta",
}  # fmt: skip


def find_family(*names: object) -> Family | None:
    """The family of the first name that is known, of names such as "T5TokenizerFast" and "xlm-roberta"."""
    for name in names:
        key = str(name).replace("Tokenizer", "").removesuffix("Fast").replace("-", "").replace("_", "").lower()
        if family := FAMILIES.get(SAME_AS.get(key, key)):
            return family
    return None
