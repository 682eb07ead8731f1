"""Draw docs/pseudo-rewards.png: what a divergence pays for a text, by how much the target wants it more than π.

python docs/pseudo_rewards.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from fdpg_fast.experiments.pictures import colour_of
from fdpg_kernels import divergences

SHOWN = ("forward_kl", "squared_hellinger", "jensen_shannon", "total_variation", "alpha:0.75", "reverse_kl")
WIDTH, LOWEST, HIGHEST = 5.0, -4.4, 6.0


def main() -> None:
    gain = torch.linspace(-WIDTH, WIDTH, 401, dtype=torch.float64)  # log p/π
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in SHOWN:
        divergence = divergences.get(name)
        colour = colour_of(name)
        axes.plot(gain, -divergence.f_prime(-gain), color=colour, label=name, linewidth=1.6)
        axes.plot(-WIDTH - 0.5, -divergence.f_prime_at_infinity, "o", color=colour, markersize=5)
    axes.set_xticks([-WIDTH - 0.5, -4, -2, 0, 2, 4], ["p = 0", "−4", "−2", "0", "2", "4"])
    axes.set(xlabel="log p(x)/π(x), nats", ylabel="pseudo-reward −f′(π/p)", ylim=(LOWEST, HIGHEST))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).parent / "pseudo-rewards.png", dpi=110)


if __name__ == "__main__":
    main()
