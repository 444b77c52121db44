"""Checks of the cluster manifests without a cluster: ``python -m infra.checks``, in the root of the repository.

This is not part of the package: none of it runs on a user's machine, and the wheel does not contain the manifests either.
"""
