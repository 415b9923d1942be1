"""What each rank had of its own when a state was saved."""

import copy
from collections.abc import Mapping
from typing import Any

import attrs

from loopkit.position import Position
from loopkit.rng import seed_apart, set_rng_state


@attrs.frozen
class OfRanks:
    """Random states, samples taken, and places in the data, of each rank of a saved state.

    Attributes:
        rng: Of each rank.
        samples: Of each rank.
        data: The place of rank 0; with those of all, under `"ranks"`, where data is their own.
    """

    rng: list[Any]
    samples: list[int]
    data: Mapping[str, Any]

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> "OfRanks":
        """What a state dict says of them."""
        rng, clock = state_dict["rng"], state_dict["clock"]
        return cls(
            rng.get("ranks") or [rng],
            clock.get("ranks") or [clock["samples"]],
            copy.deepcopy(dict(state_dict["data"])),
        )

    def take(self, state: Any) -> None:
        """Have a state go on with what its rank had.

        A rank that was not there when they were saved gets random numbers of its own.
        """
        rank, places = state.ranks.rank, self.data.get("ranks", ())
        first = {k: v for k, v in self.data.items() if k != "ranks"}
        state.samples = state.ranks.part_of(self.samples)
        state.position = Position(**copy.deepcopy(places[rank] if rank < len(places) else first))
        states = self.rng[min(rank, len(self.rng) - 1)]
        set_rng_state(states, state.device)
        if rank >= len(self.rng):
            seed_apart(rank)
        else:
            state.position.ahead = copy.deepcopy(states.get("ahead"))
