"""Run under torchrun by test_team.py: three cases of seven windows; on the second one rank cannot compute its own."""

import json
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from liverseg_dist.distributed.collectives import gather_from_ranks
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World

WINDOWS = 7


def main(broken_rank: int) -> None:
    world = World.from_environment("cpu")
    computed: list[int] = []
    outcomes = []
    with world.connected(60):
        team = WindowParallel(world.device)
        for case in range(3):

            def compute(own: Sequence[int], case: int = case) -> Iterator[Tensor]:
                for item in own:
                    if case == 1 and world.global_rank == broken_rank and item >= world.world_size:
                        raise ValueError("broken")
                    computed.append(item)
                    yield torch.full((2, 3), 100.0 * case + item)

            answers: list[float] = []
            try:
                with team.case_scope():
                    for answer in team.map_windows(compute, list(range(WINDOWS)), lambda _: (2, 3)):
                        assert answer.shape == (2, 3)
                        answers.append(float(answer[0, 0]))
                outcomes.append("done")
            except PeerFailed:
                outcomes.append("peer")
            except ValueError:
                outcomes.append("own")
            if case == 2 and world.is_main:
                print(json.dumps({"answers": answers}), flush=True)
        shares = gather_from_ranks((outcomes, computed))
        if world.is_main:
            print(json.dumps({"shares": shares}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
