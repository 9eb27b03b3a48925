// What is chosen on the page, and how its tokens and their numbers are written.
const LENGTH = DATA.tokens.length;

// layer, head: as chosen. quantity: a strip's key, or "reads". token: under the cursor. reader: whose read is followed.
const state = { layer: Math.min(1, DATA.layers.length - 1), head: 0, quantity: null, token: null, reader: LENGTH - 1 };
const layer = () => DATA.layers[state.layer];

// How a token is written: nothing of its own for the later bytes of a character.
function tokenText(i) {
  const text = DATA.tokens[i];
  if (i === 0 && text === "") return "\u25b8";
  return text === "" ? "\u00b7" : text.replace(/\n/g, "\u21b5\n");
}
function tokenName(i) {
  const text = DATA.tokens[i];
  const shown = i === 0 && text === "" ? "start of the document" : text === "" ? "(a later byte)" : `\u201c${text.replace(/\n/g, "\u21b5").replace(/^ +$/, "\u2423")}\u201d`;
  return `token ${i.toLocaleString("en")} ${shown}`;
}

// What is just below 1, as retentions are, is told by its distance from it.
const nearOne = (value) => (value > 0.99 && value < 1 ? `1 \u2212 ${+(1 - value).toPrecision(2)}` : numberText(value));
