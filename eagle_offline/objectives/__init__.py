"""What a draft is trained for, and how its worth is predicted."""
