"""When each of a Trainer's steps begins, and when the last has ended."""

import time

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        self.now()

    def on_train_end(self, *_, **__):
        self.now()

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
