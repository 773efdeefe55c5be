"""Work split over several processes or machines: under a launcher (torchrun, accelerate launch), or as shards by hand."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from diffusers_cf.errors import InputError


# What a launcher tells its processes, and Accelerate would read, too.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
# Nobody knows how long the slowest process has to work on its last patient.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Share:
    """One of `count` equal parts of a work; the whole of it by default.

    Attributes:
        index: from 0.
        count: of the parts.
        launched: whether the others run now, and can be waited for; False for shards, which know nothing of each other.
        local_index: of this process on its machine, for the choice of an accelerator.
    """

    index: int = 0
    count: int = 1
    launched: bool = False
    local_index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all, and puts together what they have done."""
        return self.index == 0

    @property
    def is_shard(self) -> bool:
        """Whether other parts are done by commands of their own."""
        return self.count > 1 and not self.launched

    def of(self, items: Sequence, sizes: Sequence[int] | None = None) -> list:
        """The items that are this part's, in their order, the same split in every process.

        Args:
            items: the whole work.
            sizes: how much each of them is; the largest go first, each to the part with least so far. None = all alike.
        """
        sizes = [1] * len(items) if sizes is None else list(sizes)
        loads, mine = [0] * self.count, []
        for number in sorted(range(len(items)), key=lambda i: -sizes[i]):
            part = min(range(self.count), key=loads.__getitem__)
            loads[part] += sizes[number]
            if part == self.index:
                mine.append(number)
        return [items[number] for number in sorted(mine)]

    def wait(self) -> None:
        """Returns when all processes of a launcher have come here."""
        if self.launched:
            import torch.distributed

            torch.distributed.barrier()

    def gather(self, values: list) -> list:
        """The values of all processes of a launcher, in their order, for each of them."""
        if not self.launched:
            return values
        import torch.distributed

        found = [None] * self.count
        torch.distributed.all_gather_object(found, values)
        return [value for part in found for value in part]


WHOLE = Share()


def share_of_work(shard: str | None = None) -> Share:
    """The part of the work that this process has been given by a launcher or by `--shard i/n`.

    After this call nothing else takes the process for one of several: a network is trained by one of them alone.

    Raises:
        InputError: `shard` is no i/n, or there is a launcher as well.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if shard:
            raise InputError("--shard is for commands of their own: a launcher splits the work by itself")
        return _join(count)
    if not shard:
        return WHOLE
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise InputError(f"--shard {shard}: it must be i/n with i from 1 to n, such as 2/8")
    return Share(index - 1, count)


def _join(count: int) -> Share:
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    share = Share(int(os.environ["RANK"]), count, launched=True, local_index=int(os.environ.get("LOCAL_RANK", 0)))
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    return share
