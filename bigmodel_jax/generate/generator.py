"""Continue prompts in batches: all at once, or piece by piece as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.generate import decoding
from bigmodel_jax.generate.sampling import Sampling
from bigmodel_jax.models.model import Model
from bigmodel_jax.parallel import rules

PIECE = 16  # tokens between two looks of the host at a stream
ROOM = 256  # new tokens that a cache has room for at first; it doubles when they are used up
PLAIN = Sampling()
Ended = Callable[[int, list[int]], bool]


@dataclass
class Continuation:
    """tokens: new ones, without what ended them. logprobs: theirs, under the unfiltered model.
    reason: "eos", "stop" or "length"; "" while it goes on. score: of a beam, the sum of log-probabilities
    (that of eos included) over length ** length_penalty.
    """

    tokens: list[int]
    logprobs: list[float]
    reason: str
    score: float | None = None


class Generator:
    """A model ready to generate. The weights are laid out once, at the first use.

    Args:
      layout: of `variables`; None for one device.
      int8: keep keys and values as int8, a quarter of their size.
      eos: tokens that end a row.
    """

    def __init__(
        self, model: Model, variables: Any, *, layout: rules.Layout | None = None, int8: bool = False,
        eos: Sequence[int] = (), pad: int = 0,
    ):  # fmt: skip
        if model.cache is None:
            raise InputError("generation needs a decoder; this model keeps no key-value cache")
        if int8 and not model.blocks:
            raise InputError("an int8 cache needs keys and values; this model's cache holds something else")
        self.model, self.layout, self.int8 = model, layout, int8
        self.variables = jax.tree.map(jnp.asarray, variables)
        self.eos, self.pad = tuple(int(end) for end in eos if end >= 0), int(pad)
        self._laid: Any = None

    def laid(self) -> Any:
        """The weights as prompts and steps read them."""
        if self._laid is None:
            spread = any(len(leaf.devices()) > 1 for leaf in jax.tree.leaves(self.variables))
            self._laid = self.variables if spread else decoding.lay_out(self.model, self.variables)
        return self._laid

    def longest(self) -> int:
        """Tokens that prompt and continuation may have together; 0 for no limit."""
        spec = getattr(self.model.module, "spec", None)
        return spec.max_length if getattr(spec, "positions", "") == "learned" else 0

    def prepare(
        self, prompts: Sequence[Sequence[int]], length: int, sources: Sequence[Sequence[int]] | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """(prompts [B, L] padded on the right, their lengths, further inputs of the model)."""
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise InputError("generation needs at least one token of prompt, for example the eos token")
        longest = self.longest()
        tokens, lengths = _padded(prompts, self.pad, longest)
        if longest and lengths.max() + length > longest:
            room = longest - int(lengths.max())
            raise InputError(
                f"a prompt of {lengths.max()} tokens and {length} new ones exceed the model's {longest} positions; "
                f"{f'ask for at most {room}' if room > 0 else 'shorten the prompt'}"
            )
        if self.model.encode is None:
            if sources is not None:
                raise InputError("this model has no encoder: it takes prompts alone")
            return tokens, lengths, {}
        if sources is None or len(sources) != len(prompts):
            raise InputError("an encoder-decoder needs one source for each prompt")
        source, sizes = _padded(sources, self.pad, longest)
        segments = (np.arange(source.shape[1]) < sizes[:, None]).astype(np.int32)
        memory = _encode(self.model, self.variables, source, segments)
        return tokens, lengths, {"memory": memory, "memory_segments": segments}

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        key: jax.Array,
        sampling: Sampling = PLAIN,
        sources: Sequence[Sequence[int]] | None = None,
        piece: int = PIECE,
        ended: Ended | None = None,
    ) -> Iterator[list[Continuation]]:
        """After every `piece` tokens, what each row has so far: one list that grows, complete when all have a reason.

        Args:
          length: new tokens at most.
          key: one key, of which row b takes fold_in(key, b), or one per row, [B].
          sources: of an encoder-decoder, one per prompt.
          ended: ended(row, tokens so far) says whether the row is done, beside eos; asked once per piece.
        """
        if length < 1:
            raise InputError(f"length {length}: ask for at least one new token")
        with rules.use(self.layout):
            yield from self._stream(prompts, length, key, sampling, sources, piece, ended)

    def _stream(self, prompts, length, key, sampling, sources, piece, ended) -> Iterator[list[Continuation]]:
        tokens, lengths, inputs = self.prepare(prompts, length, sources)
        keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))
        how = {"sampling": sampling, "eos": self.eos, "pad": self.pad}
        whole = int(lengths.max()) + length
        capacity = min(whole, int(lengths.max()) + ROOM) if self.model.blocks else whole
        state = decoding.prefill(
            self.laid(), tokens, lengths, keys, inputs,
            model=self.model, capacity=capacity, int8=self.int8, **how,
        )  # fmt: skip
        rows = [Continuation([], [], "") for _ in prompts]
        news = (np.asarray(state["token"])[:, None], np.asarray(state["logp"])[:, None])
        count = 1
        while True:
            closed = self._take(rows, *news, ended)
            if closed.any():
                state["done"] = state["done"] | closed
            if count >= length or all(row.reason for row in rows):
                for row in rows:
                    row.reason = row.reason or "length"
                yield rows
                return
            yield rows
            if count + piece > capacity - int(lengths.max()) + 1 and capacity < whole:
                capacity = min(whole, 2 * capacity)
                state = decoding.grow(state, model=self.model, capacity=capacity)
            todo = min(piece, length - count)
            state, *news = decoding.steps(self.laid(), state, todo, model=self.model, most=piece, **how)
            news = [np.asarray(new)[:, :todo] for new in news]
            count += todo

    def _take(self, rows: list[Continuation], tokens: np.ndarray, logps: np.ndarray, ended: Ended | None) -> np.ndarray:
        """Add new tokens [B, n] to the rows that go on; which rows `ended` closes, [B]."""
        closed = np.zeros(len(rows), bool)
        for number, row in enumerate(rows):
            if row.reason:
                continue
            stop = np.flatnonzero(np.isin(tokens[number], self.eos))
            end = stop[0] if len(stop) else tokens.shape[1]
            row.tokens += tokens[number, :end].tolist()
            row.logprobs += logps[number, :end].tolist()
            if ended is not None and ended(number, row.tokens):
                row.reason, closed[number] = "stop", True
            elif len(stop):
                row.reason = "eos"
        return closed

    def __call__(self, prompts: Sequence[Sequence[int]], *, length: int, **options: Any) -> list[Continuation]:
        """Complete continuations; arguments as in `stream`."""
        piece = options.pop("piece", PIECE if options.get("ended") else min(length, ROOM))
        *_, rows = self.stream(prompts, length=length, piece=max(piece, 1), **options)
        return rows


def _padded(rows: Sequence[Sequence[int]], pad: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, L] int32, lengths [B]); L is rounded up, so that few programs serve all lengths, but not beyond
    `longest`, the positions that the model has (0 for any number)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    most = int(lengths.max())
    step = 8 if most <= 64 else 64
    width = -(-most // step) * step
    out = np.full((len(rows), max(most, min(width, longest)) if longest else width), pad, np.int32)
    for ids, row in zip(out, rows, strict=True):
        ids[: len(row)] = row
    return out, lengths


def _encode(model: Model, variables: Any, source: np.ndarray, segments: np.ndarray) -> jax.Array:
    return model.encode(variables, train=False, source=source, source_segments=segments)


def generate(
    model: Model,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos: Sequence[int] = (),
    pad: int = 0,
    **options: Any,
) -> list[np.ndarray]:
    """Continuations of `prompts`, each at most `length` tokens, cut before any of `eos`: `Generator` for one call.

    Raises:
      InputError: the model has no cache (not a decoder), or a prompt is empty.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    generator = Generator(model, variables, eos=eos, pad=pad)
    rows = generator(prompts, length=length, key=key, sampling=sampling, **options)
    return [np.array(row.tokens, np.int32) for row in rows]
