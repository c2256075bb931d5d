"use strict";
(() => {
  // A click on a head sorts; figures that do not exist come last.
  const table = document.getElementById("runs"), body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const order = new Intl.Collator(undefined, { numeric: true });
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const compare = (a, b) => {
      const [x, y] = [a, b].map(row => row.cells[column]);
      if (x.dataset.value === undefined) return (up ? 1 : -1) * order.compare(x.textContent, y.textContent);
      if (x.dataset.value === "" || y.dataset.value === "") return (x.dataset.value === "") - (y.dataset.value === "");
      return (up ? 1 : -1) * (Number(x.dataset.value) - Number(y.dataset.value));
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }));
})();
