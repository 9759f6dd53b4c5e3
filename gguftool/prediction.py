"""How much a plan should cost, from the stats alone: what a measured KL divergence is held against.

What goes of a layer is missing in its output. Counted as noise, neuron by neuron and as if the neurons were independent, it
is sum of g^2 h_k^2 ||W_:k||^2 over what goes, in units of the residual stream's squared length at each token; `noise` adds
that up over the layers. KL divergence is about proportional to it. Measured on the two models of the README (7 M and 27 M
parameters), every method, 25 to 50 % gone, 84 plans on two texts each, KL in nats was between 0.17 and 14 times the noise:
0.6 to 2 on held-out text of the calibration domain with the 7 M model, 0.17 to 10 with the 27 M model (10 is its random
control), up to 14 outside of the domain; small are refitted weights, which this does not count. Of other domains a plan knows
nothing: experts that its texts never used cost nothing by it. So files are held against it on their calibration texts, and LIMIT
leaves a factor of 5 above all that was seen there. A fault in a file (a tensor in another's place, a wrong router) has no
reason to keep to it.
"""

from __future__ import annotations

from math import log

import numpy as np

from .plan import PrunePlan
from .saliency import neuron_criterion
from .stats import CalibrationStats

LIMIT = 50.0
# What a further quantization may cost, in KLs of the unpruned model quantized alike: what was seen is about 1.
QUANTIZED = 3.0
# Nats that two right computations may be apart by rounding (`evaluate.DEVICE_KLD`): no bound is below.
FLOOR = 5e-3


def noise(stats: CalibrationStats, plan: PrunePlan) -> float | None:
    """What the plan takes away, as a share of the residual stream's energy, summed over the layers.

    None for stats without the stream's lengths, which calibration of some GGUF files cannot take.
    """
    if stats.residual_inverse is None or stats.tokens == 0:
        return None
    value = neuron_criterion("gated-second-moment").measure(stats)
    lost = 0.0
    for layer in plan.layers:
        row = stats.model.moe_layers.index(layer.index)
        gone = np.ones(value.shape[1:], dtype=bool)
        for expert, neurons in zip(layer.router, layer.retained, strict=True):
            gone[expert, neurons] = False
        lost += float(value[row][gone].sum()) * float(stats.residual_inverse[row]) / stats.tokens**2
    return lost


def bound(noise: float | None, quantized: float, n_vocab: int, base_ppl: float) -> float:
    """The most KL divergence, in nats, that a sound file of such a plan may have.

    Args:
        noise: of the plan, see above; None where it cannot be told.
        quantized: KL of the unpruned model quantized alike, 0 where nothing was quantized.

    Whatever the plan, a model farther from the original than one that gives every token of the vocabulary the same
    probability is no model: that one is ln(n_vocab) - H away, H, the original's entropy, being about ln(perplexity).
    """
    # An original that guesses worse than chance says nothing of its entropy, which may then be next to 0.
    nothing_known = log(n_vocab) - (log(base_ppl) if base_ppl < n_vocab else 0.0)
    return nothing_known if noise is None else min(nothing_known, LIMIT * noise + QUANTIZED * quantized + FLOOR)
