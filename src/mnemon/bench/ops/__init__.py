"""Speed of the update rules: every form beside the others, beside published implementations, beside a plain copy."""
