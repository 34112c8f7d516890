"""Text from a decoder or encoder-decoder: prefill and a loop of steps over a cache that is a value."""

from bigmodel_jax.generate.beam import beam_search
from bigmodel_jax.generate.generator import Continuation, Generator, generate
from bigmodel_jax.generate.sampling import Sampling, choose, filter_logits

__all__ = ["Continuation", "Generator", "Sampling", "beam_search", "choose", "filter_logits", "generate"]
