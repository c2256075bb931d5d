"""Image files and what is known of them: tasks, splits, classes; decoded once, held and served in batches."""
