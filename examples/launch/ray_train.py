"""Ray: python examples/launch/ray_train.py --hosts=2 -- --config=configs/sft_lora.py --workdir=/shared/mine

One process on each of so many nodes, with all of what a node has; what follows `--` is for `sftjax train`. On TPU nodes
--resources='{"TPU": 4}' says what a node has. The workdir is a directory that all nodes share. Run it again and it resumes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Host:
    """A process on a node of its own."""

    def address(self) -> str:
        """Where the others find this one."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def train(self, argv: list[str], coordinator: str, count: int, index: int) -> int:
        given = [f"--coordinator={coordinator}", f"--num-processes={count}", f"--process-id={index}"]
        return subprocess.run([sys.executable, "-m", "sftjax.cli", "train", *argv, *given], env={**os.environ}).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--resources", type=json.loads, default={"GPU": 8}, help="of each node, as JSON")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="after --: what `sftjax train` is given")
    args = parser.parse_args()
    argv = [item for item in args.argv if item != "--"]
    ray.init()
    group = placement_group([{"CPU": 1, **args.resources}] * args.hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    own = {name: n for name, n in args.resources.items() if name not in ("CPU", "GPU")}
    hosts = [
        ray.remote(Host)
        .options(
            num_cpus=1,
            num_gpus=args.resources.get("GPU", 0),
            resources=own,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        )
        .remote()
        for i in range(args.hosts)
    ]
    coordinator = ray.get(hosts[0].address.remote())
    codes = ray.get([host.train.remote(argv, coordinator, args.hosts, i) for i, host in enumerate(hosts)])
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
