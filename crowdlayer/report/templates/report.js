"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { classes, widest, workers, matrices } = data;
  const LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const PER_PAGE = 25;
  const $ = id => document.getElementById(id);
  const make = (tag, text, cls) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (cls) element.className = cls;
    return element;
  };
  const draw = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // The workers: sorted, searched, a page at a time.
  const body = $("workers"), heads = [...document.querySelectorAll("#table th[data-column]")];
  const order = new Intl.Collator(undefined, { numeric: true });
  let shown = workers.map((_, row) => row), column = 2, up = true, page = 0, chosen = -1;
  const value = (row, at) => at === 6 ? classes[workers[row][6]] : workers[row][at];
  const compare = (a, b) => {
    const x = value(a, column), y = value(b, column);
    return (typeof x === "number" ? x - y : order.compare(x, y)) * (up ? 1 : -1) || a - b;
  };
  const interval = ([, , quality, low, high]) => {
    const svg = draw("svg", { class: "interval", viewBox: "0 0 120 14", "aria-hidden": "true" });
    svg.append(
      draw("path", { class: "s-grid", "stroke-width": 1, d: "M0 7H120" }),
      draw("path", { class: "s-one", "stroke-width": 3, d: `M${120 * low} 7H${Math.max(120 * high, 120 * low + 1)}` }),
      draw("circle", { class: "f-ink", cx: 120 * quality, cy: 7, r: 3.5 }));
    return svg;
  };
  const whole = share => Math.round(100 * share);
  const percent = share => (100 * share).toFixed(1);
  const line = row => {
    const w = workers[row], tr = make("tr");
    tr.dataset.row = row;
    const cell = (text, cls) => { const td = make("td", text, cls); tr.append(td); return td; };
    const first = cell();
    if (row < matrices.length) {
      const button = make("button", w[0]);
      button.dir = "auto";
      button.type = "button";
      button.addEventListener("click", () => choose(row));
      first.append(button);
    } else first.append(make("bdi", w[0]));
    if (w[8]) first.append(" ", make("span", "spammer?", "badge"));
    cell(w[1], "number");
    cell(percent(w[2]), "number").append(" ", make("span", `${whole(w[3])}–${whole(w[4])}`, "note"));
    cell().append(interval(w));
    cell(percent(w[5]), "number");
    cell(classes[w[6]]); cell(w[7].toFixed(2), "number");
    if (row === chosen) tr.className = "chosen";
    return tr;
  };
  const render = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    body.replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(line));
    for (const head of heads) {
      const here = Number(head.dataset.column) === column;
      if (here) head.setAttribute("aria-sort", up ? "ascending" : "descending"); else head.removeAttribute("aria-sort");
    }
    $("count").textContent = `${shown.length} of ${workers.length} workers, page ${page + 1} of ${pages}`;
    $("back").disabled = page === 0;
    $("next").disabled = page === pages - 1;
  };
  const search = () => {
    const query = $("search").value.trim().toLowerCase(), suspects = $("suspects").checked;
    shown = workers.map((_, row) => row).filter(row => (!suspects || workers[row][8]) &&
      (!query || workers[row][0].toLowerCase().includes(query) || classes[workers[row][6]].toLowerCase().includes(query)));
    shown.sort(compare);
    page = 0;
    render();
  };
  for (const head of heads) head.querySelector("button").addEventListener("click", () => {
    const clicked = Number(head.dataset.column);
    up = clicked === column ? !up : clicked === 0 || clicked === 2 || clicked === 5 || clicked === 6;
    column = clicked;
    search();
  });
  $("search").addEventListener("input", search);
  $("suspects").addEventListener("change", search);
  $("back").addEventListener("click", () => { page--; render(); });
  $("next").addEventListener("click", () => { page++; render(); });

  // The matrix of one worker.
  const choose = row => {
    chosen = row;
    const k = classes.length, edge = Math.max(3, Math.min(34, 330 / k)), named = edge >= 8;
    const short = name => name.length > 14 ? name.slice(0, 13) + "…" : name;
    const left = named ? 14 + 6.4 * widest : 6, side = left + k * edge + 4;
    const w = workers[row];
    const svg = draw("svg", { viewBox: `0 0 ${side} ${side}`, width: side, role: "img",
      "aria-label": `Estimated confusion matrix of worker ${w[0]}, right ${percent(w[2])} % of the time` });
    for (let t = 0; t < k; t++) {
      const middle = left + (t + 0.5) * edge;
      if (named) svg.append(
        draw("text", { class: "f-ink", x: left - 5, y: middle + 4, "font-size": Math.min(11, edge * 0.8), "text-anchor": "end" }, short(classes[t])),
        draw("text", { class: "f-ink", x: middle + 4, y: left - 5, "font-size": Math.min(11, edge * 0.8), transform: `rotate(-90 ${middle + 4} ${left - 5})` }, short(classes[t])));
      for (let a = 0; a < k; a++) {
        const share = LEVELS.indexOf(matrices[row][t * k + a]) / 63;
        svg.append(draw("rect", { class: "f-one", x: left + a * edge, y: left + t * edge, width: edge - (named ? 1 : 0), height: edge - (named ? 1 : 0),
          "fill-opacity": (0.04 + 0.96 * share).toFixed(3), "data-tip": `${classes[t]} → ${classes[a]}: ${Math.round(100 * share)} %` }));
      }
    }
    const caption = make("p", `Worker ${w[0]}: rows are true classes, columns its answers; the shade is the probability of that answer.`, "note");
    $("matrix").replaceChildren(make("h3", `Worker ${w[0]}`), svg, caption);
    for (const tr of body.children) tr.classList.toggle("chosen", Number(tr.dataset.row) === row);
  };
  for (const element of document.querySelectorAll(".screen")) element.hidden = false;
  search();
  if (matrices.length) choose(0);
})();
