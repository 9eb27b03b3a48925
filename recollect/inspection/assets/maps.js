// The attention maps of a layer and head, stage by stage.
let rowScale = false;
const readerLines = [];

function renderMaps() {
  const section = get("maps"), maps = layer().maps;
  section.hidden = !maps.length;
  readerLines.length = 0;
  if (!maps.length) return get("map-panels").replaceChildren();
  const block = maps[0].block;
  get("pooling").textContent = block === 1 ? "Every cell is one query and one key."
    : `The text is long: a cell is a square of ${block} queries and ${block} keys, and shows ${DATA.pool === "mean" ? "the mean of the visible entries in it" : "the strongest visible entry in it: the largest logit, or the weight farthest from zero"}.`;
  const control = select("colours", [["map", "one scale per map"], ["row", "one scale per row"]], rowScale ? "row" : "map", (value) => {
    rowScale = value === "row";
    renderMaps();
    get("map-controls").querySelector("select").focus();
  });
  get("map-controls").replaceChildren(control);
  get("map-panels").replaceChildren(...maps.map(stageFigure));
  markReader();
}

function stageFigure(map) {
  const side = map.side, values = square(map, side, state.head), most = largest(values) || 1;
  const kind = map.logits || values.some((value) => value < -1e-6 * most) ? "diverging" : "sequential";
  const perRow = Array.from({ length: side }, (_, row) => largest(values.subarray(row * side, row * side + row + 1)) || 1);
  const range = (cell) => {
    const first = cell * map.block, last = Math.min(LENGTH, first + map.block) - 1;
    return first === last ? tokenName(first) : `tokens ${first.toLocaleString("en")} to ${last.toLocaleString("en")}`;
  };
  const field = heatMap({
    rows: side, cols: side, values, kind,
    share: (value, row) => value / (rowScale ? perRow[row] : most),
    label: `${map.title}, ${layer().label}, head ${state.head}; arrow keys read values, Enter follows a row`,
    describe: (row, col) => `query: ${range(row)}\nkey: ${range(col)}\n${col > row ? "later than the query" : Number.isNaN(values[row * side + col]) ? "out of sight" : `${map.block > 1 ? (DATA.pool === "mean" ? "mean " : "strongest ") : ""}${nearOne(values[row * side + col])}`}`,
    picked: (row) => follow(Math.min(LENGTH, (row + 1) * map.block) - 1),
  });
  const mark = node("div", { class: "cursor row", hidden: "" });
  field.append(mark);
  readerLines.push({ mark, map });
  const scale = rowScale ? ["0", "largest of the row"] : [kind === "diverging" ? numberText(-most) : "0", numberText(most)];
  return mapFigure(map.title, legend(...scale, kind), field, LENGTH);
}

// A line at the row whose read is followed.
function markReader() {
  for (const { mark, map } of readerLines) {
    mark.hidden = state.quantity !== "reads";
    toRow(mark, Math.floor(state.reader / map.block), map.side);
  }
}
