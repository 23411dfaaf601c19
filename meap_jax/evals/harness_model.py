"""Our decoder as a model of lm-evaluation-harness. Imports lm_eval, which is an optional package."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from meap_jax.evals.predictions import Predictions, prompt_hash
from meap_jax.evals.prompting import BATCHES_A_SAVE, everywhere
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Params
from meap_jax.sampling import Sampling
from meap_jax.scoring import Request, Scorer, left_truncated

_NOT_SCORED = -1e9  # In the place of a log-probability, since the harness takes no request back; see `skipped`.
_MAX_GEN_TOKS = 256  # Where a task says nothing; the harness' own.
_CONTEXTS_KEPT = 4_096  # Requests of one document follow each other, and each has its context tokenized.


class HarnessModel(TemplateLM):
    """Answers requests from the file of predictions, or from the model.

    Attributes:
      adds_bos: whether a text begins with the begin of a document.
      counts: requests that were asked, truncated and skipped; of whole texts each window is one.
      skipped: pairs of context and continuation that were not scored.
    """

    def __init__(self, setting: Setting, params: Params, predictions: Predictions, scorer: Scorer | None = None):
        """Takes the options of `eval.commonsense`; `params` are held until the object goes away.

        Args:
          setting: the model, its tokenizer and options.
          params: as `OpenModel.params`.
          predictions: what was answered before, which grows.
          scorer: of `make_scorer`, whose programs are then compiled once for several models.
        """
        super().__init__()
        options = setting.config.eval.commonsense
        self._setting, self._params, self._predictions = setting, params, predictions
        self._scorer = scorer or make_scorer(setting)
        self._encode = functools.lru_cache(_CONTEXTS_KEPT)(setting.tokenizer.encode)
        self.adds_bos = {"auto": setting.adds_bos, "yes": True, "no": False}[options.bos]
        self._skips = options.too_long == "skip"
        self._bos_text = setting.tokenizer.decode([setting.tokenizer.bos_id])
        self.counts = {"requests": 0, "truncated": 0, "skipped": 0}
        self.skipped: set[tuple[str, str]] = set()

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self._setting.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in front of a text that has no context."""
        return self._setting.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with one begin of a document at most.

        A text that spells it in front, as templates do, gets one token for it. In other places it stays text: our
        tokenizers never give a special id for text.
        """
        spells_bos = string.startswith(self._bos_text)
        adds_bos = self.adds_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id] * (adds_bos or spells_bos) + self._encode(string.removeprefix(self._bos_text))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The sum of log-probabilities of each continuation, and whether it is the greedy one."""
        keys: list[str | None] = []
        asked: dict[str, Request] = {}
        for texts, context, continuation in requests:
            context = context or [self.prefix_token_id]  # Of spaces alone, which the harness gives to what follows.
            request = left_truncated((context, continuation), self._setting.seq_len)
            is_whole = request is not None and len(request[0]) == len(context)
            self.counts["requests"] += 1
            if request is None or (self._skips and not is_whole):
                self.counts["skipped"] += 1
                self.skipped.add(texts)
                keys.append(None)
                continue
            self.counts["truncated"] += not is_whole
            key = prompt_hash([*request[0], *continuation], continuation=len(continuation))
            keys.append(key)
            asked[key] = request
        scores = self._scores(asked)
        return [(_NOT_SCORED, False) if key is None else scores[key] for key in keys]

    def _scores(self, asked: dict[str, Request]) -> dict[str, tuple[float, bool]]:
        """Of each request, by its key; those that are not there yet are scored and kept batch by batch."""
        names, known = list(asked), self._predictions.records
        found = np.array([known[name]["output"] if name in known else (np.nan, 0) for name in names]).reshape(-1, 2)
        found = np.array(everywhere(found))
        missing = np.flatnonzero(np.isnan(found[:, 0]))
        new = [asked[names[i]] for i in missing]
        for numbers, scores in self._scorer.score(self._params, new) if new else ():
            found[missing[numbers]] = scores
            self._predictions.add(
                {"prompt": names[missing[n]], "output": list(score)} for n, score in zip(numbers, scores, strict=True)
            )
        return {name: (float(log_prob), bool(greedy)) for name, (log_prob, greedy) in zip(names, found, strict=True)}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of `seq_len` as the harness cuts them.

        A begin of a document stands in front of the first window and is not predicted itself, whatever the policy: with
        it in the text as well there would be two.
        """
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        of_texts: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                tokens = tokens[1:]
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._setting.seq_len, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                of_texts.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(of_texts, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, up to a stop string; prompts that are too long lose their left end.

        Greedy unless the task samples; then a request that comes again is drawn again, as it is for repeats.

        Raises:
          ConfigError: a setting of the task that can't be.
          DataError: there is no room for so many new tokens.
        """
        outputs: list[str] = [""] * len(requests)
        for settings, numbers in _by_settings(requests):
            options: dict[str, Any] = normalize_gen_kwargs(settings, _MAX_GEN_TOKS)
            max_new, until = options["max_gen_toks"], [text for text in options["until"] if text]
            sampling = Sampling()
            if temperature := options.get("temperature", 0.0):
                sampling = Sampling(temperature, options.get("top_k") or 0, options.get("top_p") or 1.0)
            keys, asked, times = [], dict[str, list[int]](), Counter[str]()
            for i in numbers:
                self.counts["requests"] += 1
                tokens = self.tok_encode(requests[i].args[0])
                extra = len(tokens) + max_new - self._setting.seq_len
                self.counts["truncated"] += extra > 0
                tokens = tokens[max(extra, 0) :] or [self.prefix_token_id]
                key = prompt_hash(tokens, max_new_tokens=max_new, stop=until, sampling=list(vars(sampling).values()))
                times[key] += 1
                if temperature and times[key] > 1:
                    key += f"-{times[key]}"
                keys.append(key)
                asked[key] = tokens
            self._continue(asked, max_new_tokens=max_new, stop_strings=until, sampling=sampling)
            for i, key in zip(numbers, keys, strict=True):
                # Another host than the first has only what was just asked, and writes no results.
                outputs[i] = self._predictions.records.get(key, {"output": ""})["output"]
        return outputs

    def _continue(self, asked: dict[str, list[int]], **options: Any) -> None:
        """Continues the prompts that have no prediction yet, and keeps them some batches at a time."""
        names = list(asked)
        is_known = everywhere(np.array([name in self._predictions.records for name in names], bool))
        missing = sorted((names[i] for i in np.flatnonzero(~is_known)), key=lambda name: len(asked[name]))
        if not missing:
            return
        size = self._setting.config.eval.batch_size * BATCHES_A_SAVE
        with self._setting.generator(self._params) as generator:
            for start in range(0, len(missing), size):
                own = missing[start : start + size]
                found = generator.generate([asked[name] for name in own], seed=start, **options)
                self._predictions.add(
                    {"prompt": name, "output": completion.text} for name, completion in zip(own, found, strict=True)
                )


def make_scorer(setting: Setting) -> Scorer:
    """The scorer of a setting's model, with its options."""
    return Scorer(setting.model, batch_size=setting.config.eval.batch_size, seq_len=setting.seq_len)


def _by_settings(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests with equal settings of generation, in order."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        settings = request.args[1]
        groups.setdefault(repr(sorted(settings.items(), key=str)), (settings, []))[1].append(i)
    yield from groups.values()
