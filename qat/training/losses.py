"""What training minimises: weights of divergences from the teacher and of cross-entropy."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """A weighted sum of means over tokens, in nats, at T = 1, fp32 inside. P is the teacher, Q the student.

    Attributes:
        kl: Weight of forward KL, KL(P || Q): Q covers all that P does (arXiv:1503.02531).
        reverse_kl: Weight of reverse KL, KL(Q || P): Q keeps to what P finds likely (arXiv:2306.08543; here over every
            position of the data, not of sampled sequences).
        jsd: Weight of the generalized Jensen-Shannon divergence, beta KL(P || M) + (1 - beta) KL(Q || M) with
            M = beta P + (1 - beta) Q (arXiv:2306.13649, eq. 1). It is bounded; its gradient goes to that of beta times
            forward KL as beta goes to 0, and to that of (1 - beta) times reverse KL as beta goes to 1.
        beta: The teacher's share of M.
        ce: Weight of cross-entropy with the next token.

    Raises:
        ValueError: A weight is negative or not finite, all are 0, or beta is not between 0 and 1.
    """

    kl: float = 1.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    beta: float = 0.5
    ce: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("kl", "reverse_kl", "jsd", "ce")}
        wrong = [
            f"{name}={weight}: a weight is finite and not negative, or the loss would push away from its target; use 0 "
            f"to leave {name} out"
            for name, weight in weights.items()
            if not 0 <= weight < math.inf
        ]
        if not any(weights.values()):
            wrong.append(f"every weight is 0 ({', '.join(weights)}), so nothing would be learned; set one to 1")
        if not 0 < self.beta < 1:
            wrong.append(f"beta={self.beta}: a share between 0 and 1, both excluded; at 0 use kl=1, at 1 reverse_kl=1")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def weights(self) -> dict[str, float]:
        """The parts that count, by name."""
        weights = {"kl": self.kl, "reverse_kl": self.reverse_kl, "jsd": self.jsd, "ce": self.ce}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def distils(self) -> bool:
        """Whether the full-precision teacher is needed."""
        return bool(self.weights.keys() - {"ce"})
