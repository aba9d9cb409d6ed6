"""The classifiers that read no order: what a task must be out of reach of."""

import re
from collections import Counter, defaultdict

import numpy as np
import torch


def words(text: str | None) -> list[str]:
    return re.findall(r"[a-z0-9'-]+", (text or "").lower())


def features(record) -> set[str]:
    """Which words are in the first text, in the second, in both, in one alone, and how many."""
    first, second = set(words(record.text)), set(words(record.second))
    found = {f"1 {w}" for w in first} | {f"2 {w}" for w in second}
    if record.second is not None:
        found |= {f"both {w}" for w in first & second} | {f"only 1 {w}" for w in first - second}
        found |= {f"only 2 {w}" for w in second - first} | {f"shared {len(first & second)}"}
        found |= {f"apart {len(first ^ second)}"}
    return found


def matrices(task):
    names = sorted({name for record in task["train"] for name in features(record)})
    place = {name: i for i, name in enumerate(names)}

    def matrix(split):
        x = torch.zeros(len(task[split]), len(names) + 1)
        for row, record in enumerate(task[split]):
            x[row, [place[name] for name in features(record) if name in place]] = 1
        x[:, -1] = 1
        return x, torch.tensor([record.label for record in task[split]])

    return matrix("train"), matrix("valid"), matrix("test")


def bag_of_words(task) -> float:
    """The test score of logistic (ridge) regression on the words; the penalty is chosen on valid."""
    (x, y), (xv, yv), (xt, yt) = matrices(task)
    best = (-1.0, -1.0)
    for penalty in (0.3, 3.0, 30.0):
        if task.kind == "regression":
            w = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)
            scores = [float(np.corrcoef((a @ w).numpy(), b.numpy())[0, 1]) for a, b in ((xv, yv), (xt, yt))]
        else:
            w = logistic(x, y, len(task.labels), penalty)
            scores = [float(((a @ w).argmax(1) == b).float().mean()) for a, b in ((xv, yv), (xt, yt))]
        best = max(best, tuple(scores))
    return best[1]


def logistic(x, y, classes: int, penalty: float):
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ w, y) + penalty / len(y) * w.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def most_frequent_tags(task) -> list[list[int]]:
    """For each test sentence the tag that each word has most often in training; for new words the commonest of all."""
    seen, all_ = defaultdict(Counter), Counter()
    for record in task["train"]:
        for word, tag in zip(record.words, record.tags, strict=True):
            seen[word.lower()][tag] += 1
            all_[tag] += 1
    return [[(seen.get(w.lower()) or all_).most_common(1)[0][0] for w in record.words] for record in task["test"]]


def answers_by_overlap(task) -> float:
    """Exact match of a reader that counts: of the words that answered questions with the same beginning in training
    (or, where there is none, of all words that training has not), the one whose sentence shares most with the question.
    """
    kinds, known = defaultdict(set), set()
    for record in task["train"]:
        kinds[_beginning(record.question)].add(record.answers[0].lower())
        known |= set(words(record.context))
    right = 0
    for record in task["test"]:
        asked, best = set(words(record.question)), (-1, -1, "")
        for sentence in record.context.split(". "):
            own = words(sentence)
            for word in set(own) - asked:
                fits = (word in kinds[_beginning(record.question)]) * 2 or (word not in known)
                best = max(best, (int(fits > 0), len(asked & set(own)), word))
        right += best[2] == record.answers[0].lower()
    return right / len(task["test"])


def _beginning(question: str) -> str:
    return " ".join(words(question)[:3])


def word_by_word(task) -> float:
    """Exact match of a translator that knows each word's most likely translation, and no order, case or agreement."""
    together, left, right = Counter(), Counter(), Counter()
    for record in task["train"]:
        source, target = set(words(record.source)), set(words(record.targets[0]))
        left.update(source)
        right.update(target)
        together.update((a, b) for a in source for b in target)
    best: dict[str, tuple[float, str]] = {}
    for (a, b), count in together.items():
        best[a] = max(best.get(a, (0.0, "")), (2 * count / (left[a] + right[b]), b))
    said = [" ".join(best[w][1] for w in words(r.source) if best[w][0] > 0.3) for r in task["test"]]
    return sum(a == " ".join(words(r.targets[0])) for a, r in zip(said, task["test"], strict=True)) / len(said)


def majority(task) -> float:
    """The test score of always saying the commonest label of training."""
    label = Counter(record.label for record in task["train"]).most_common(1)[0][0]
    return sum(record.label == label for record in task["test"]) / len(task["test"])


def spans(tags, labels) -> set[tuple[int, int, str]]:
    """(first, after the last, kind) of the entities in BIO tags."""
    found, start, kind = set(), None, ""
    for i, tag in enumerate([*(labels[t] for t in tags), "O"]):
        if start is not None and tag != f"I-{kind}":
            found.add((start, i, kind))
            start = None
        if tag.startswith("B-") or (tag.startswith("I-") and start is None):
            start, kind = i, tag[2:]
    return found


def tag_scores(task, predicted) -> dict[str, float]:
    right = [a == b for record, tags in zip(task["test"], predicted, strict=True) for a, b in zip(record.tags, tags)]  # noqa: B905
    true = [spans(record.tags, task.labels) for record in task["test"]]
    said = [spans(tags, task.labels) for tags in predicted]
    both = sum(len(a & b) for a, b in zip(true, said, strict=True))
    return {
        "accuracy": sum(right) / len(right),
        "span_f1": 2 * both / max(1, sum(map(len, true)) + sum(map(len, said))),
    }
