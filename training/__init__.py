"""What a training run needs beside its loop: the step, its inputs, resuming, folder."""
