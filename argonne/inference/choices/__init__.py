"""Multiple choice: questions from local files, how they are put to a model, and what it makes of them."""
