"""Split work over the processes of a launcher (torchrun, accelerate launch), or over shards started one by one."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from diffusers_cf.errors import InputError


# The variables by which a launcher and Accelerate tell processes apart.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


@dataclass(frozen=True)
class Share:
    """One of `count` parts of the work; all of it by default.

    Attributes:
        index (`int`): number of the part, from 0.
        count (`int`): number of parts.
        launched (`bool`): True for processes of a launcher, which can wait for each other; False for shards.
        local_index (`int`): number of this process on its machine; chooses the GPU.
    """

    index: int = 0
    count: int = 1
    launched: bool = False
    local_index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and combines the results."""
        return self.index == 0

    @property
    def is_shard(self) -> bool:
        """Whether the other parts are separate commands."""
        return self.count > 1 and not self.launched

    def of(self, items: Sequence, sizes: Sequence[int] | None = None) -> list:
        """Return the items of this part in their order.

        Args:
            items (`Sequence`): the whole work.
            sizes (`Sequence[int]`, *optional*): cost of each item; equal costs by default. Costly items come first, and
                each goes to the part with the lowest total.
        """
        sizes = sizes or [1] * len(items)
        loads, mine = [0] * self.count, []
        for number in sorted(range(len(items)), key=lambda i: -sizes[i]):
            part = min(range(self.count), key=loads.__getitem__)
            loads[part] += sizes[number]
            if part == self.index:
                mine.append(number)
        return [items[number] for number in sorted(mine)]

    def wait(self) -> None:
        """Wait until all processes of a launcher call this function."""
        if self.launched:
            import torch.distributed

            torch.distributed.barrier()

    def gather(self, values: list) -> list:
        """Return the values of all processes of a launcher, in the order of the processes."""
        if not self.launched:
            return values
        import torch.distributed

        found = [None] * self.count
        torch.distributed.all_gather_object(found, values)
        return [value for part in found for value in part]


def share_of_work(shard: str | None = None) -> Share:
    """Return the part of the work that a launcher or `--shard i/n` assigns to this process.

    The launcher's environment variables are removed, so that Accelerate trains a network in this process alone.

    Raises:
        InputError: `shard` is not i/n, or is given under a launcher.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if shard:
            raise InputError("--shard can't be used under a launcher, which splits the work itself")
        import torch.distributed

        # the fastest process may wait for hours until the slowest has finished its last patient
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
        for name in _LAUNCHED:
            os.environ.pop(name, None)
        return Share(rank, count, launched=True, local_index=local_rank)
    if not shard:
        return Share()
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise InputError(f"--shard {shard}: it must be i/n with i from 1 to n, such as 2/8")
    return Share(index - 1, count)
