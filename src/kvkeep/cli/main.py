"""The program: its commands and its version. Loads no tensors; a command loads what it needs."""

import click

from kvkeep import __version__
from kvkeep.cli.bench import bench
from kvkeep.cli.cache import cache
from kvkeep.cli.chat import chat
from kvkeep.cli.config_show import config
from kvkeep.cli.demo import demo
from kvkeep.cli.doctor import doctor
from kvkeep.cli.run import run
from kvkeep.cli.serve import serve

__all__ = ["main"]


@click.group()
@click.version_option(__version__, prog_name="kvkeep")
def main() -> None:
    """The KV cache of LLM inference: kept, shared, given back exactly."""


for _command in (demo, run, chat, serve, doctor, cache, bench, config):
    main.add_command(_command)


if __name__ == "__main__":
    main()
