"""Rollouts of any length: does the memory stay as small, and does a place come back after minutes?"""
