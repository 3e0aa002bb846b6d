"""What is predicted: closed forms and their optima. No random numbers on this floor."""
