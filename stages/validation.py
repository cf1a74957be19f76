from stages.flatfile import ModelBytes
def validated(data: ModelBytes, shown: str) -> None: pass
