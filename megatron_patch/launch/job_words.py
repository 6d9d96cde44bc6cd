"""A job as its user would start it, looked at from another machine: for rehearse_llava.sh and plan_llava.sh."""

import argparse
from collections.abc import Mapping, Sequence

from megatron_patch import device
from megatron_patch.launch.machine import Job, free_port
from megatron_patch.launch.rows import Call, Command
from megatron_patch.launch.run_file import expand
from megatron_patch.launch.training import stage

STAGES = {"run_mcore_llava.sh": 1, "run_sft_mcore_llava.sh": 2}
JOB = "the launcher's name and its arguments, or --config FILE; ENV is not looked at"


def command_of(words: Sequence[str]) -> Command:
    """The launcher that the words begin with."""
    return stage(STAGES[words[0].rpartition("/")[2]])


def job_call(
    parser: argparse.ArgumentParser, words: Sequence[str], world: int, per_node: int, environment: Mapping[str, str]
) -> tuple[Call, Job]:
    """The call of a launcher on node 0 of a job of so many GPUs; ends with what is wrong with it."""
    if not words or words[0].rpartition("/")[2] not in STAGES:
        parser.error(f"wanted a launcher and its arguments behind the options; launchers: {', '.join(STAGES)}")
    command, program, given = command_of(words), words[0].rpartition("/")[2], list(words[1:])
    told = {"WORLD_SIZE": str(world), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(free_port())}  # a run of this machine may have any
    told |= {"NPROC_PER_NODE": str(per_node), "ACCELERATOR": device.kinds()[0], "GPUS": "", "DRY_RUN": "1"}
    around = {name: value for name, value in environment.items() if not name.endswith("_SOCKET_IFNAME")} | told
    complaints: list[str] = []
    if given[:1] in (["--config"], ["--from"]):
        given, around, complaints = expand(command, program, given, around)
        around |= told
    if given and not complaints:
        given[0] = "multinode"
    call = Call(command, program, given, around)
    job = command.check(call)
    for complaint in complaints:
        call.complain("", complaint.strip())
    call.end_if_wrong()
    return call, job
