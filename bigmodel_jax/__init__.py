"""bigmodel_jax: large-scale pretraining in JAX and Flax, with results one can believe."""

__version__ = "0.1.0"
