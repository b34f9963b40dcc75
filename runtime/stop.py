"""Stop strings, found in a stream of characters."""


class StopString:
    """Finds a string in a stream of characters, each looked at once (Knuth, Morris and Pratt).

    Attributes:
        matched: characters of the string that the stream ends with.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.length = len(text)
        self.matched = 0
        self._shorter = [0] * len(text)  # for each prefix, the longest shorter prefix that it ends with
        for index in range(1, len(text)):
            self._advance(text[index])
            self._shorter[index] = self.matched
        self.matched = 0

    def push(self, character: str) -> bool:
        """Whether the string is complete now."""
        self._advance(character)
        return self.matched == self.length

    def overlook(self) -> None:
        """Go on after the string was complete, as if it had not been."""
        self.matched = self._shorter[-1]

    def _advance(self, character: str) -> None:
        while self.matched and self._text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self._text[self.matched] == character
