"""Functions run in several processes that know each other through gloo."""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _start(rank, world, folder, function):
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        torch.set_num_threads(1)
        torch.save(function(rank, world), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(function, world, folder):
    """What function(rank, world) returned in each; they start as copies of one that has torch."""
    multiprocessing.set_forkserver_preload(["torch", "churn_kernels"])
    folder.mkdir()
    mp.start_processes(_start, (world, folder, function), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
