"""What is measured of a policy, its rounds and its engine."""
