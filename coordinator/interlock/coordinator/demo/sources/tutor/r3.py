"""Revision 3: keeps something on the GPU for every question, and never lets go of it."""

import r2

from interlock.broker.simgpu import GpuOutOfMemory

KEPT_BYTES = 32 << 20  # per question: the cache that somebody forgot to bound


class Hungry(r2.Indexed):
    model_bytes = 10 << 30  # a larger model, too

    def rank(self, looked_for: list[str]) -> dict[str, int]:
        try:
            self.model.resize(self.model_bytes + self.asked * KEPT_BYTES)
        except GpuOutOfMemory:
            self.log.error("the GPU is full")
        return super().rank(looked_for)
