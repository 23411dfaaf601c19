"""Our decoder as a model of lm-evaluation-harness. Imports lm_eval, which is an optional package."""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from meap_jax.evals.predictions import Predictions, prompt_hash
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Params
from meap_jax.sampling import Sampling
from meap_jax.scoring import Request, Scorer

_NOT_SCORED = -1e9  # In the place of a log-probability, since the harness takes no request back; see `skipped`.
_MAX_GEN_TOKS = 256  # Where a task says nothing; the harness' own.


class HarnessModel(TemplateLM):
    """Answers requests from the file of predictions, or from the model.

    Attributes:
      counts: requests that were asked, truncated and skipped.
      skipped: pairs of context and continuation that were not scored.
    """

    def __init__(self, setting: Setting, params: Params, predictions: Predictions):
        """Takes the options of `eval.commonsense`; `params` are held until the object goes away."""
        super().__init__()
        options = setting.config.eval.commonsense
        self._setting, self._params, self._predictions = setting, params, predictions
        self._scorer = Scorer(setting.model, batch_size=setting.config.eval.batch_size, seq_len=setting.seq_len)
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
        adds_bos = (self.adds_bos or spells_bos) if add_special_tokens is None else add_special_tokens or spells_bos
        return [self.prefix_token_id] * adds_bos + self._setting.tokenizer.encode(string.removeprefix(self._bos_text))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The sum of log-probabilities of each continuation, and whether it is the greedy one."""
        pairs: list[Request | None] = []
        for texts, context, continuation in requests:
            self.counts["requests"] += 1
            extra = len(context) + len(continuation) - (self._setting.seq_len + 1)
            if extra > 0 and (self._skips or extra >= len(context)):  # No context would be left.
                self.counts["skipped"] += 1
                self.skipped.add(texts)
                pairs.append(None)
                continue
            self.counts["truncated"] += extra > 0
            pairs.append((context[max(extra, 0) :], continuation))
        keys = [
            None if pair is None else prompt_hash([*pair[0], *pair[1]], continuation=len(pair[1])) for pair in pairs
        ]
        known = self._predictions.records
        asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if pair is not None and key not in known}
        names, new = list(asked), list(asked.values())
        for numbers, scores in self._scorer.score(self._params, new) if new else ():
            found = zip(numbers, scores, strict=True)
            self._predictions.add({"prompt": names[i], "output": list(score)} for i, score in found)
        return [(_NOT_SCORED, False) if key is None else self._known(key) for key in keys]

    def _known(self, key: str) -> tuple[float, bool]:
        log_prob, is_greedy = self._predictions.records[key]["output"]
        return log_prob, is_greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of `seq_len` as the harness cuts them.

        A begin of a document stands in front of the first window and is not predicted itself, whatever the policy: with
        it in the text as well there would be two.
        """
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._setting.seq_len, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(log_prob for log_prob, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, up to a stop string; prompts that are too long lose their left end."""
        outputs: list[str] = [""] * len(requests)
        for settings, numbers in _by_settings(requests):
            self.counts["requests"] += len(numbers)
            max_new = int(settings.get("max_gen_toks") or _MAX_GEN_TOKS)
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else [text for text in until if text]
            temperature = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
            prompts, keys = [], []
            for i in numbers:
                tokens = self.tok_encode(requests[i].args[0])
                extra = len(tokens) + max_new - self._setting.seq_len
                self.counts["truncated"] += extra > 0
                prompts.append(tokens[max(extra, 0) :] or [self.prefix_token_id])
                keys.append(prompt_hash(prompts[-1], max_new_tokens=max_new, stop=until, temperature=temperature))
            missing = [n for n, key in enumerate(keys) if key not in self._predictions.records]
            if missing:
                with self._setting.generator(self._params) as generator:
                    found = generator.generate(
                        [prompts[n] for n in missing],
                        max_new_tokens=max_new,
                        stop_strings=until,
                        sampling=Sampling(temperature),
                    )
                self._predictions.add(
                    {"prompt": keys[n], "output": completion.text} for n, completion in zip(missing, found, strict=True)
                )
            for i, key in zip(numbers, keys, strict=True):
                outputs[i] = self._predictions.records[key]["output"]
        return outputs


def _by_settings(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests with equal settings of generation, in order."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        settings = request.args[1]
        groups.setdefault(repr(sorted(settings.items(), key=str)), (settings, []))[1].append(i)
    yield from groups.values()
