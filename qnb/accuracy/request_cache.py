"""What an lm-eval task asks, built and tokenized once: every precision, and every later run, asks the same.

lm-eval builds a task's requests again for every model, and its own cache of them is a pickle known by the task's name,
which a changed data file or another draw would not miss. Here requests and their token ids lie in JSON lines, in a
file named by all they follow from: documents, templates, shots, tokenizer and lm-eval's version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnb.ledger import checked, fingerprint, unchecked

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from qnb.accuracy.scorer import Encoded, SharedContextLM

FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True, slots=True)
class Question:
    """All requests about one document, in order."""

    kind: str  # lm-eval's request type
    arguments: tuple[tuple[Any, ...], ...]


class Questions:
    """The documents drawn of a task and its subtasks, and the requests made of them.

    Parameters
    ----------
    tasks
        lm-eval's tasks by name, loaded. From here on they answer `build_all_requests` from what was built once.
    drawn
        The documents taken of each, ascending; None takes all.
    """

    def __init__(self, tasks: Mapping[str, Any], drawn: Mapping[str, Sequence[int]] | None) -> None:
        self.tasks = tasks
        self.sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
        self.drawn = {name: list(drawn[name] if drawn else range(size)) for name, size in self.sizes.items()}
        # lm-eval looks each document up in this list, so all of them are better left out
        self.samples = {name: these for name, these in self.drawn.items() if len(these) < self.sizes[name]}
        self._documents = {name: [tasks[name].eval_docs[place] for place in self.drawn[name]] for name in tasks}
        self._built: dict[str, list[Question]] = {}

    @cached_property
    def data_sha256(self) -> str:
        """Return the fingerprint of what is asked: the documents drawn, and those shown as examples."""
        digest = sha256()
        for name, task in self.tasks.items():
            shown = list(task.sampler.df) if task.get_config("num_fewshot") and hasattr(task, "sampler") else []
            for part in (name, *zip(self.drawn[name], self._documents[name], strict=True), *shown):
                digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        return digest.hexdigest()

    def prepare(self, lm: Any, folder: Path | None, name: str) -> None:
        """Build the requests, or read them from `folder`, and hand them to the tasks with no answers yet.

        Parameters
        ----------
        lm
            Whom they are for; one that keeps token ids (`qnb.accuracy.scorer`) gets them.
        folder
            Where files are kept; None keeps none.
        name
            The task as it was asked for.
        """
        if not self._built:
            path = folder / f"{name}.{self._key(lm)}.jsonl" if folder else None
            if path is None or not path.exists() or not self._read(path, lm):
                self._build()
                if path is not None:
                    self._write(path, lm)
        for leaf, task in self.tasks.items():
            task.build_all_requests = self._handing(leaf, task)

    def _handing(self, leaf: str, task: Any) -> Callable[..., None]:
        def hand_over(**_: Any) -> None:
            task._instances = list(self._instances(leaf, task))

        return hand_over

    def _build(self) -> None:
        """Have lm-eval make the requests, as it does for every model it is given."""
        for name, task in self.tasks.items():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            type(task).build_all_requests(task, samples=self.samples.get(name))
            made: list[list[Instance]] = [[] for _ in self._documents[name]]
            for instance in task.instances:
                assert instance.idx == len(made[instance.doc_id]), "a document's requests are numbered in order"
                made[instance.doc_id].append(instance)
            self._built[name] = [Question(every[0].request_type, tuple(one.args for one in every)) for every in made]

    def _instances(self, name: str, task: Any) -> Iterator[Instance]:
        from lm_eval.api.instance import Instance

        for place, (document, question) in enumerate(zip(self._documents[name], self._built[name], strict=True)):
            for number, arguments in enumerate(question.arguments):
                own = tuple(deepcopy(part) if isinstance(part, dict) else part for part in arguments)
                yield Instance(question.kind, document, own, number,
                               (task.config.task, place, task.config.repeats))  # fmt: skip

    def _key(self, lm: SharedContextLM) -> str:
        import lm_eval

        def named(function: Any) -> str:
            return str(getattr(function, "__qualname__", function))  # as text it is where it lies in memory

        configs = {name: task.dump_config() for name, task in self.tasks.items()}
        return fingerprint(
            {
                "data": self.data_sha256,
                "tasks": json.dumps(configs, sort_keys=True, default=named),
                "lm_eval": lm_eval.__version__,
                "tokenizer": tokenizer_sha256(lm.tokenizer),
                "special": [lm.add_bos_token, lm.prefix_token_id],
            }
        )

    def _write(self, path: Path, lm: SharedContextLM) -> None:
        """Encode the requests and write them, whole or not at all."""
        every = [(name, question) for name, questions in self._built.items() for question in questions]
        asked = {kind: [one for _, question in every if question.kind == kind for one in question.arguments]
                 for kind in ("loglikelihood", "generate_until")}  # fmt: skip
        lm.encode_pairs(asked["loglikelihood"])
        lm.encode_contexts(context for context, *_ in asked["generate_until"])
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            for name, question in every:
                file.write(checked(_line(name, question, lm.encoded)))
        draft.replace(path)

    def _read(self, path: Path, lm: SharedContextLM) -> bool:
        """Take the requests and token ids from a file; return whether it holds a question a document."""
        built: dict[str, list[Question]] = {name: [] for name in self.tasks}
        try:
            with path.open("rb") as file:
                for line in file:
                    name, question, encoded = _question(json.loads(unchecked(line)))
                    built[name].append(question)
                    lm.encoded |= encoded
        except (ValueError, KeyError, TypeError):
            return False
        whole = all(len(built[name]) == len(documents) for name, documents in self._documents.items())
        self._built = built if whole else {}
        return whole


def _line(name: str, question: Question, encoded: Encoded) -> dict[str, Any]:
    """Return a question for a file: a context and its ids once, what follows it with its own."""
    contexts = list(dict.fromkeys(arguments[0] for arguments in question.arguments))
    ids: dict[str, Any] = {}
    rest: list[Any] = []
    for context, *more in question.arguments:
        found = encoded.get((context, *more) if question.kind == "loglikelihood" else (context,))
        ids[context] = found[0] if found else None
        rest.append([contexts.index(context), more, found[-1] if found and len(found) > 1 else None])
    return {"task": name, "kind": question.kind, "contexts": [[text, ids[text]] for text in contexts], "rest": rest}


def _question(line: dict[str, Any]) -> tuple[str, Question, Encoded]:
    """Return what `_line` wrote: task, question and token ids."""
    arguments: list[tuple[Any, ...]] = []
    encoded: Encoded = {}
    for number, more, own in line["rest"]:
        context, ids = line["contexts"][number]
        arguments.append((context, *more))
        if ids is not None:
            encoded[(context, *more) if own is not None else (context,)] = (ids,) if own is None else (ids, own)
    return line["task"], Question(line["kind"], tuple(arguments)), encoded


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fingerprint of how a tokenizer cuts texts."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    # how the last batch was padded is no part of it
    rules = {name: value for name, value in rules.items() if fast is None or name not in ("padding", "truncation")}
    text = json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map, rules], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()
