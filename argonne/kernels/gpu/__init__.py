"""The Triton programs, how they are launched, and the ops that ``torch.compile`` sees. Imports triton."""
