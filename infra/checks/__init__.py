"""Checks of the cluster manifests without a cluster: ``python -m infra.checks``, in the root of the repository.

Not part of the package: nothing of it runs on a user's machine, and the manifests are not in the wheel either.
"""
