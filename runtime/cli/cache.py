"""``topt-run cache``."""

import click

from topt_deploy.console import Log

from .options import log_format_option


@click.command()
@click.option("--clear", is_flag=True, help="Remove the engines.")
@log_format_option
def cache(clear: bool, log_format: str) -> None:
    """List the TensorRT engines that are kept on this machine, the one used longest ago first."""
    from ..backends.tensorrt_cache import EngineCache, cache_folder, cache_limit

    folder, limit = cache_folder(), cache_limit()
    kept = EngineCache(folder, limit) if folder.exists() else None
    entries = kept.entries() if kept is not None else []
    if clear and kept is not None:
        kept.clear()
    lines = [f"{key[:16]}  {size / 1e6:10.1f} MB" for _, size, key in entries]
    total = sum(size for _, size, _ in entries)
    what = "removed" if clear else "kept"
    lines.append(f"{len(entries)} engines {what}, {total / 1e9:.2f} GB (of {limit / 1e9:g} GB), {folder}")
    facts = [{"key": key, "bytes": size, "used": used} for used, size, key in entries]
    Log(log_format).result("\n".join(lines), event="cache", folder=str(folder), cleared=clear, engines=facts)
