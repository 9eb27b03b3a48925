// Heat maps on a canvas, a pixel per cell scaled up by CSS, read by pointer or arrow keys; and the attention maps of a layer and head.

// spec: rows, cols, values (row by row; NaN or null is blank), share(value, row) in [-1, 1], kind, label, describe(row, col), picked(row).
function heatMap(spec) {
  const canvas = node("canvas", { width: spec.cols, height: spec.rows, tabindex: 0, role: "img", "aria-label": spec.label });
  const cursor = node("div", { class: "cursor", hidden: "" });
  const field = node("div", { class: "field" }, canvas, cursor);
  let [row, col] = [spec.rows - 1, 0];

  function draw() {
    const context = canvas.getContext("2d"), image = context.createImageData(spec.cols, spec.rows), color = ramp(spec.kind);
    for (let i = 0; i < spec.rows * spec.cols; i++) {
      const value = spec.values[i];
      if (value === null || Number.isNaN(value)) continue;
      const [r, g, b] = color(spec.share(value, Math.floor(i / spec.cols)));
      const at = 4 * i;
      image.data[at] = r; image.data[at + 1] = g; image.data[at + 2] = b; image.data[at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  function tell(x, y) {
    Object.assign(cursor.style, {
      left: `${(100 * col) / spec.cols}%`, top: `${(100 * row) / spec.rows}%`, width: `${100 / spec.cols}%`, height: `${100 / spec.rows}%`,
    });
    cursor.hidden = false;
    showTip(spec.describe(row, col), x, y);
  }

  const clear = () => { cursor.hidden = true; hideTip(); };
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    row = Math.max(0, Math.min(spec.rows - 1, Math.floor(((event.clientY - frame.top) / frame.height) * spec.rows)));
    col = Math.max(0, Math.min(spec.cols - 1, Math.floor(((event.clientX - frame.left) / frame.width) * spec.cols)));
    tell(event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", clear);
  canvas.addEventListener("blur", clear);
  canvas.addEventListener("click", () => spec.picked?.(row));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") clear();
    if (event.key === "Enter") spec.picked?.(row);
    if (!move) return;
    event.preventDefault();
    row = Math.max(0, Math.min(spec.rows - 1, row + move[0]));
    col = Math.max(0, Math.min(spec.cols - 1, col + move[1]));
    const frame = canvas.getBoundingClientRect();
    tell(frame.left + ((col + 0.5) / spec.cols) * frame.width, frame.top + ((row + 0.5) / spec.rows) * frame.height);
  });
  theme.addEventListener("change", () => { if (canvas.isConnected) draw(); });
  draw();
  return field;
}

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
  get("map-panels").replaceChildren(...maps.map(mapFigure));
  markReader();
}

// The whole square of one head; keys after the query are blank.
function square(map) {
  const side = map.side, flat = ofHead(map, (side * (side + 1)) / 2), values = new Float32Array(side * side).fill(NaN);
  let at = 0;
  for (let row = 0; row < side; row++) for (let col = 0; col <= row; col++) values[row * side + col] = flat[at++];
  return values;
}

function mapFigure(map) {
  const side = map.side, values = square(map), most = largest(values) || 1;
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
    describe: (row, col) => `query: ${range(row)}\nkey: ${range(col)}\n${col > row ? "later than the query" : Number.isNaN(values[row * side + col]) ? "out of sight" : `${map.block > 1 ? (DATA.pool === "mean" ? "mean " : "strongest ") : ""}${numberText(values[row * side + col])}`}`,
    picked: (row) => follow(Math.min(LENGTH, (row + 1) * map.block) - 1),
  });
  const mark = node("div", { class: "cursor row", hidden: "" });
  field.append(mark);
  readerLines.push({ mark, map });
  const edge = [0, Math.floor((LENGTH - 1) / 2), LENGTH - 1].map((i) => i.toLocaleString("en"));
  const ends = (axis) => node("div", { class: `ticks ${axis} ends`, "aria-hidden": "true" }, ...edge.map((text) => node("span", {}, text)));
  const scale = rowScale ? ["0", "largest of the row"] : [kind === "diverging" ? numberText(-most) : "0", numberText(most)];
  return node("figure", {},
    node("figcaption", {}, node("strong", {}, map.title), legend(scale[0], scale[1], kind === "diverging" ? "var(--low),var(--zero),var(--high)" : "var(--zero),var(--warm)")),
    node("div", { class: "heat" }, ends("y"), field, node("span"), ends("x"), node("div", { class: "name" }, "key \u2192, query \u2193")));
}

// A line at the row whose read is followed.
function markReader() {
  for (const { mark, map } of readerLines) {
    mark.hidden = state.quantity !== "reads";
    const row = Math.floor(state.reader / map.block);
    Object.assign(mark.style, { top: `${(100 * row) / map.side}%`, height: `${100 / map.side}%` });
  }
}
