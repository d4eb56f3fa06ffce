"""Training: step, loop, optimizer and schedule, callbacks, evaluation. `python -m oryx_megatron.train RUN.yaml`."""
