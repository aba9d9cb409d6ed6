"""Which kind of task becomes examples how."""

from minillm.data.tasks import Task
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.compare.heads import Choices, Classification, Regression, Tagging
from minillm.recipes.compare.problem import Problem
from minillm.recipes.compare.questions import Questions
from minillm.recipes.compare.rewriting import Completing, Translating
from minillm.recipes.locate import Loaded

PROBLEMS: dict[str, type[Problem]] = {
    "classification": Classification,
    "regression": Regression,
    "choice": Choices,
    "tagging": Tagging,
    "question_answering": Questions,
}
WRITERS: dict[str, type[Problem]] = {"decoder": Completing, "encoder_decoder": Translating}


def make_problem(base: Loaded, task: Task, config: CompareConfig) -> Problem:
    """The task for this base; ValueError where the two do not go together."""
    kind = base.model.config.kind
    if task.kind == "rewriting" and kind not in WRITERS:
        raise ValueError(
            f"the task {task.name!r} asks for texts, and an encoder writes none: choose a decoder or an "
            "encoder-decoder as base, such as base=tiny-encdec"
        )
    problem = (WRITERS[kind] if task.kind == "rewriting" else PROBLEMS[task.kind])(base, task, config)
    if config.length > (most := base.model.config.max_positions):
        raise ValueError(f"length={config.length} is more than the base's max_positions={most}: lower it")
    if problem.count("train") < config.batch_size:
        raise ValueError(
            f"train has {problem.count('train')} records, fewer than batch_size={config.batch_size}: lower it"
        )
    return problem
