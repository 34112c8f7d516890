"""Mixtral 8x7B on C4: a mixture of 8 experts of which each token uses 2 (Jiang et al. 2024).

    bigmodel plan --config configs/mixtral.py --target v5p:8x8x8

Shapes and the rotary base are the paper's (table 1) and those of the released model; 46.7 B parameters, 12.9 B of them
active for a token. No token is dropped, as in the release; cut by experts, `mesh.room` bounds what a device may
receive, and results/plans.md takes 2 even shares, beyond which tokens would be dropped and counted. Learning rate,
schedule and balance loss are not published: they are those of llama.py's 8B and the coefficient of Switch (Fedus et
al. 2022). The budget is 20 tokens per active parameter.

Compiled, not trained, by this project: see results/plans.md.
"""

from configs import llama


def get_config():
    config = llama.get_config("8b")  # of the same width, depth and heads
    config.steps = int(20 * 12.9e9) // llama.TOKENS
    config.model.update(vocab_size=32000, rope_theta=1_000_000.0, num_experts=8, experts_per_token=2)
    config.objective.balance_loss = 0.01
    config.data.vocab_size = 32000
    return config
